"""The help of the commands, completion in a shell, and messages that name options."""

from __future__ import annotations

import importlib
import io
import re
import shlex
import subprocess
import sys

import pytest

from gpt2jax.cli import COMMANDS, main
from gpt2jax.cli.common import _name_option, _parse
from gpt2jax.cli.compare import Options as CompareOptions
from gpt2jax.cli.finetune import Options as FinetuneOptions
from gpt2jax.cli.finetune import imply_lora
from gpt2jax.utils.notices import wrap_lines

PREFIXED = ("finetune", "plan", "study")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_two_examples_that_parse(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    shown = capsys.readouterr().out
    examples = re.findall(r"^\$ (gpt2jax .+)$", shown, re.MULTILINE)
    assert end.value.code == 0 and len(examples) == 2
    options = importlib.import_module(f"gpt2jax.cli.{name}").Options
    for example in examples:
        program, command, *words = shlex.split(example)
        assert (program, command) == ("gpt2jax", name)
        words = imply_lora(name, words) if name in PREFIXED else words
        assert isinstance(_parse(name, options, words, prefixes=name in PREFIXED), options)


def test_help_of_finetune_shows_common_options_first_and_groups(capsys):
    with pytest.raises(SystemExit):
        main(["finetune", "--help"])
    shown = capsys.readouterr().out
    titles = re.findall(r"^[^\w\n]*(\w[\w ]*) options[^\w\n]*$", shown, re.MULTILINE)
    assert titles == ["data", "training", "generation", "lora", "tokenizer", "several processes"]
    assert re.findall(r"^[^\w\n-]{1,3}(--[a-z][\w.-]+)", shown, re.MULTILINE)[:3] == [
        "--model",
        "--out",
        "--lora",
    ]


def test_completion_is_a_script_for_the_shell(capsys):
    with pytest.raises(SystemExit) as end:
        main(["completion", "bash"])
    script = capsys.readouterr().out
    assert not end.value.code and "# Bash completion for gpt2jax" in script
    assert all(f"'{name}': {{'description'" in script for name in COMMANDS)
    assert "--lora.rank" in script and "'--sequence-length'" in script
    with pytest.raises(SystemExit) as end:
        main(["completion", "fish"])
    said = capsys.readouterr().err
    assert end.value.code == 2 and "the shell must be one of bash, zsh, tcsh, got 'fish'" in said


@pytest.mark.parametrize(
    ("options", "message", "named"),
    [
        (FinetuneOptions, "batch_size must be a positive whole number", "--batch-size must be"),
        (FinetuneOptions, "lora.rank must be a positive whole number", "--lora.rank must be"),
        (FinetuneOptions, "base_dtype must be None without lora", "--base-dtype must be"),
        (CompareOptions, "models must be at least two", "models must be"),
        (CompareOptions, "batch_size=3 does not go with x", "batch_size=3 does"),
        (CompareOptions, "learning_rate must be a positive number", "learning_rate must"),
    ],
)
def test_name_option_puts_the_option_for_the_setting(options, message, named):
    assert _name_option(message, options).startswith(named)


@pytest.mark.slow
def test_python_m_gpt2jax_is_the_command():
    done = subprocess.run([sys.executable, "-m", "gpt2jax", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("gpt2jax ")


def test_wrap_lines_breaks_long_lines_of_a_terminal_between_words(monkeypatch):
    monkeypatch.setenv("COLUMNS", "19")
    terminal = io.StringIO()
    text = "one line that is too long\n\n$ gpt2jax generate --model runs/mine\nshort"
    assert wrap_lines(text, terminal) == text
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    assert wrap_lines(text, terminal) == text.replace("is too", "is\ntoo")


def test_interrupted_study_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("gpt2jax.studies.study"), "study", interrupt)
    (tmp_path / "a.txt").write_text("\n".join(map(str, range(40))))
    with pytest.raises(SystemExit) as end:
        main(["study", "--data", f"{tmp_path}/a.txt", "--documents", "line", "--out", f"{tmp_path}/s"])
    assert end.value.code == 130
    assert f"interrupted; --resume goes on with the study in {tmp_path}/s" in capsys.readouterr().err
