"""The layer rule: every folder of the package imports only folders that stand above it in `LAYERS`."""

from __future__ import annotations

import ast
import pathlib
from collections.abc import Iterator

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "gpt2jax"
LAYERS = (
    "utils",
    "sharding",
    "ops",
    "model",
    "tokenizer",
    "data",
    "lora",
    "weights",
    "generation",
    "language_model",
    "loading",
    "train",
    "plan",
    "evaluation",
    "comparison",
    "report",
    "studies",
    "doctor",
    "cli",
    "__main__",
)
# methods of data classes that users call, each a late import inside the method: (file, imported folder)
EXCEPTIONS = {
    ("language_model.py", "loading"),
    ("language_model.py", "weights.hf"),
    ("language_model.py", "weights.keras"),
    ("comparison/result.py", "report"),
    ("generation/outputs.py", "report.notebook"),
    ("train/trainer.py", "report"),
    ("evaluation/result.py", "report.notebook"),
}


def imported_modules(source: str) -> Iterator[str]:
    """Yield the modules of the package that a file imports, without the leading "gpt2jax."."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("gpt2jax."):
            yield node.module.removeprefix("gpt2jax.")
        elif isinstance(node, ast.Import):
            names = (alias.name for alias in node.names if alias.name.startswith("gpt2jax."))
            yield from (name.removeprefix("gpt2jax.") for name in names)


def broken_rules(file: str, source: str) -> list[str]:
    """Return what a file imports against the rule."""
    here = file.split("/")[0].removesuffix(".py")
    allowed = LAYERS[: LAYERS.index(here) + 1]
    return [
        f"{file} imports {module}"
        for module in imported_modules(source)
        if module.split(".")[0] not in allowed
        and not any(file == own and module.startswith(other) for own, other in EXCEPTIONS)
    ]


def module_imports() -> dict[str, set[str]]:
    """Return the modules that each module imports, those inside functions too."""
    files = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")
    }
    return {
        name: {module for module in imported_modules(path.read_text("utf-8")) if module in files}
        for name, path in files.items()
    }


@pytest.mark.parametrize(
    "file",
    sorted(
        str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"
    ),
)
def test_layers_file_imports_only_layers_above(file):
    assert broken_rules(file, (PACKAGE / file).read_text("utf-8")) == []


def test_layers_rule_catches_an_import_from_below():
    assert broken_rules("ops/linear.py", "def f():\n    from gpt2jax.model.gpt2 import GPT2") != []
    assert broken_rules("model/gpt2.py", "from gpt2jax.ops.linear import matmul") == []


def test_layers_every_folder_is_in_the_list():
    entries = {path.stem for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert entries - {"__pycache__", "__init__", "assets"} == set(LAYERS)


def test_modules_import_each_other_in_no_circle():
    imports = module_imports()
    imports["language_model"] -= {"loading", "weights.hf", "weights.keras"}
    imports["comparison.result"] -= {"report.save", "report.plots"}
    imports["train.trainer"] -= {"report.plots"}
    for name in ("generation.outputs", "train.trainer", "evaluation.result", "comparison.result"):
        imports[name] -= {"report.notebook"}
    remaining = dict(imports)
    while free := [name for name, needed in remaining.items() if not needed & (remaining.keys() - {name})]:
        for name in free:
            del remaining[name]
    assert sorted(remaining) == []
