"""What all commands share: their list, one line and a code for a mistake, what they print."""

from __future__ import annotations

import io
import re
import signal
import subprocess
import sys
from functools import partial

import pytest
from commands import fails
from jax.errors import JaxRuntimeError
from rich.console import Console

from gpt2jax.cli import evaluate, main
from gpt2jax.cli.common import check_file, check_folder, print_line, run_command
from gpt2jax.cli.finetune import Options, imply_lora
from gpt2jax.cli.options import DataOptions
from gpt2jax.data import sources
from gpt2jax.train.stopping import Interrupted


def test_run_command_tells_a_setting_without_the_class_of_the_options(capsys):
    message = fails(capsys, "evaluate", "--limit", "0")
    assert message.startswith(
        "gpt2jax evaluate: error: --limit must be a positive whole number, or None, got 0;"
    )


def test_what_standard_output_cannot_take(capsys, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        assert "No space left on device" in fails(capsys, "evaluate", "--help")
    with io.TextIOWrapper(io.BytesIO(), "ascii") as narrow:
        monkeypatch.setattr("sys.stdout", narrow)
        run_command("evaluate", DataOptions, lambda options: print("é"), [])
        assert narrow.buffer.getvalue() == b"\\xe9\n"  # pyright: ignore[reportAttributeAccessIssue]


def test_brackets_in_names_are_no_markup():
    console = Console(file=io.StringIO(), width=40)
    print_line(console, "wrote", "runs/[/b] " + "x" * 40)
    console.print(evaluate.figures_table("m[b] on numeric-docs", {"loss": 1.0, "perplexity": None}))
    shown = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert shown.startswith(f"wrote  runs/[/b] {'x' * 40}\nm[b] on numeric-docs")
    assert re.search(r"perplexity +│ +not finite", shown)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (FloatingPointError("step 3: loss nan"), 1),
        (Interrupted(signal.SIGINT, "stopped"), 130),
        (Interrupted(signal.SIGTERM, "stopped"), 143),
        (KeyboardInterrupt(), 130),
        (ValueError("two\nlines"), 2),
    ],
    ids=["nan", "SIGINT", "SIGTERM", "Ctrl-C", "mistake"],
)
def test_run_command_ends_with_one_line_and_a_code(capsys, error, code):
    def run(_):
        raise error

    with pytest.raises(SystemExit) as exit_:
        run_command("finetune", Options, run, [], prefixes=True)
    assert exit_.value.code == code
    said = " ".join(str(error).split()) or "interrupted"
    assert capsys.readouterr().err == f"gpt2jax finetune: error: {said}\n"


@pytest.mark.parametrize(
    "error",
    [MemoryError(), JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore")],
    ids=["numpy", "XLA"],
)
def test_run_command_tells_that_memory_is_not_enough_in_one_line(capsys, error):
    def run(_):
        raise error

    with pytest.raises(SystemExit) as exit_:
        run_command("finetune", Options, run, [], prefixes=True)
    assert exit_.value.code == 2
    reason = "MemoryError" if isinstance(error, MemoryError) else str(error).splitlines()[0]
    said = capsys.readouterr().err
    assert said.startswith(f"gpt2jax finetune: error: there is not enough memory: {reason}; a smaller batch,")
    assert said.count("\n") == 1


def test_run_command_cuts_a_message_of_megabytes_and_keeps_its_end(capsys):
    def run(_):
        raise ValueError(f"columns: {'a' * 10**6}; name one")

    with pytest.raises(SystemExit):
        run_command("finetune", Options, run, [], prefixes=True)
    said = capsys.readouterr().err
    assert len(said) < 3100 and "columns: aaa" in said and said.endswith("aaa; name one\n")


def test_start_by_the_script_lists_the_options():
    command = [sys.executable, "scripts/finetune.py", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True)
    assert shown.returncode == 0 and "--seed" in shown.stdout and "--out" in shown.stdout


def test_main_lists_the_commands_and_names_the_nearest_one(capsys):
    assert (
        fails(capsys, "finetuen")
        == "gpt2jax: error: there is no command 'finetuen'; did you mean 'finetune'?"
    )
    main(["--help"])
    assert "finetune" in capsys.readouterr().out


def test_main_command_has_seed_and_out(capsys):
    for name in ("generate", "evaluate", "compare", "convert"):
        with pytest.raises(SystemExit) as exit_:
            main([name, "--help"])
        shown = capsys.readouterr().out
        assert exit_.value.code == 0 and "--seed" in shown and "--out" in shown


@pytest.mark.parametrize("command", ["finetune", "evaluate", "compare", "study"])
def test_commands_check_the_model_before_they_read_texts(capsys, monkeypatch, tmp_path, command):
    monkeypatch.setattr(sources, "load_texts", lambda *_, **__: pytest.fail("texts were read"))
    models = ["gpt2-mini", "runs/mine"] if command == "compare" else ["--model", "runs/mine"]
    line = fails(capsys, command, *models, "--data", "missing.jsonl", "--out", str(tmp_path / "out"))
    assert "there is no model at runs/mine" in line


@pytest.mark.parametrize("words", ["--eval-split a --eval-split b", "--eval-split=a --eval_split b"])
def test_commands_refuse_repeated_options(capsys, words):
    line = fails(capsys, "evaluate", *words.split())
    assert "--eval-split is given twice" in line
    assert imply_lora("finetune", ["--lora", "--lora.rank", "4"]) == ["--lora", "--lora.rank", "4"]


@pytest.mark.parametrize("check", [check_folder, partial(check_file, overwrite=True)], ids=["folder", "file"])
def test_check_out_names_a_link_to_nothing(tmp_path, check):
    (tmp_path / "a").symlink_to(tmp_path / "none" / "b")
    (tmp_path / "c").symlink_to("c")
    for path in (tmp_path / "a", tmp_path / "a" / "b" / "d", tmp_path / "c", tmp_path / "c" / "d"):
        with pytest.raises(OSError, match=rf"{tmp_path}/[ac] is a link to .*, which does not exist"):
            check(path)
    check(tmp_path / "new" / "e")
