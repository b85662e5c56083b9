"""SECURITY.md names what is there, and what it says of pickles and code holds."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "SECURITY.md").read_text("utf-8")
# what would carry out or look up what a file names
FORBIDDEN = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "yaml"}
CALLS = {"eval", "exec", "compile", "__import__"}


def test_security_names_files_that_exist():
    names = re.findall(r"`((?:gpt2jax|tests)/[\w/.]+)`", TEXT) + re.findall(r"\]\(([\w/.]+)\)", TEXT)
    assert len(names) > 5 and all((ROOT / name).exists() for name in names)


def test_security_names_the_variable_of_the_limits():
    from gpt2jax.utils.limits import VARIABLE

    assert f"`{VARIABLE}`" in TEXT


@pytest.mark.parametrize(
    "folder", ["data", "evaluation", "tokenizer", "weights", "train", "utils", "comparison"]
)
def test_readers_run_no_code_of_a_file(folder):
    for path in (ROOT / "gpt2jax" / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                assert not FORBIDDEN & {alias.name for alias in node.names}, path
            elif isinstance(node, ast.ImportFrom):
                assert node.module not in FORBIDDEN, path
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in CALLS, path
            elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert isinstance(node.value, ast.Constant) and node.value.value is False, path
