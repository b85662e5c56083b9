"""What README.md and the pages of docs/ tell people to type: it runs, or at least its options exist."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator

import pytest

import gpt2jax
from gpt2jax.cli import common, main

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# commands with one of these as a word need a network, or take minutes: their options are parsed, nothing is run
NOT_HERE = {
    "gpt2",
    "gpt2-medium",
    "gpt2-xl",
    "pubmed",
    "python-docs",
    "--resume",
    "runs/gpt2-mini-numeric-docs",
}
LONG = (["gpt2jax", "finetune"], ["gpt2jax", "study", "--limit", "300"])
SENTENCES = ["The rows are sorted by date.", "Return the sum of all values.", "Each call opens a new file."]


def blocks_of(page: pathlib.Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def commands_of(page: pathlib.Path) -> Iterator[list[str]]:
    """The words of each command on a page, without comments and variables."""
    for block in blocks_of(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            for command in line.split("&&"):
                words = shlex.split(command, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                    words = words[1:]
                if words:
                    yield words


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """The current folder of someone who reads the documents: it has a file of texts and a model of theirs."""
    texts = [f"{first} {second}" * 8 for first in SENTENCES for second in SENTENCES] * 8
    rows = [json.dumps({"id": i, "body": f"{text} {i}"}) for i, text in enumerate(texts)]
    (tmp_path / "my.jsonl").write_text("\n".join(rows))
    gpt2jax.load("gpt2-mini").save(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpt2jax"])
    return tmp_path


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks_of(page, "python")], ids=lambda page: page.stem
)
def test_snippets_run(page, workplace):
    """The snippets of a page, one after another in one program."""
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks_of(page, "python"):
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks_of(page, "bash")], ids=lambda page: page.stem
)
def test_commands_run(page, workplace, monkeypatch):
    """Those of gpt2jax; the ones that need a network or minutes are parsed."""
    for words in commands_of(page):
        if words[0] != "gpt2jax":
            check_words(words)
        elif NOT_HERE & set(words) or words in LONG or "XLA_FLAGS" in page.read_text():
            parse_only(words[1:], monkeypatch)
        else:
            main(words[1:])


def parse_only(arguments: list[str], monkeypatch) -> None:
    """Parse a command's arguments as it does, and stop before it runs."""

    class Parsed(Exception):
        """Raised instead of the command's work."""

    parse = common._parse

    def parse_and_stop(*args, **kwargs):
        parse(*args, **kwargs)
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(common, "_parse", parse_and_stop)
        with pytest.raises(Parsed):
            main(arguments)


def check_words(words: list[str]) -> None:
    """Check a command of another program: the script is there and knows the options, the extra exists."""
    if words[0] == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        named = {
            name for word in words for found in re.findall(r"\[(.*?)\]", word) for name in found.split(",")
        }
        assert named <= set(extras)
    elif words[0] == "python" and words[1].endswith(".py"):
        script = (ROOT / words[1]).read_text()
        for option in (word for word in words[2:] if word.startswith("--")):
            if words[1].startswith("benchmarks/"):
                assert f'"{option}"' in script, f"{words[1]} has no {option}"


def test_links_of_the_readme_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text()):
        assert target.startswith("http") or os.path.exists(ROOT / target), target


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_reference_has_every_public_name():
    named = re.findall(
        r"^::: gpt2jax\.(\w+)", (ROOT / "docs" / "reference.md").read_text(), flags=re.MULTILINE
    )
    assert sorted(named) == sorted(gpt2jax.__all__)
