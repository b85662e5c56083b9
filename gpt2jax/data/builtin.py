"""Texts that are on every machine that runs gpt2jax: the documentation inside installed Python sources.

* `python-docs`: Python's language reference (`pydoc_data.topics`) and the docstrings of the standard library;
* `numeric-docs`: the docstrings of numpy, jax, flax and optax.

A document is a language topic, a module's docstring, a function, or a class with its methods; each docstring stands
under a heading with the signature, as in a printed reference. Sources are parsed, never imported, so the result
depends on the versions of Python and the packages alone. A docstring that occurs twice is kept once, and a document
goes to a split by a hash of its name: no text is in two splits.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import inspect
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

SPLITS = ("train", "validation", "test")
BUILTIN_NAMES = ("python-docs", "numeric-docs")
NUMERIC_PACKAGES = ("numpy", "jax", "flax", "optax")
MIN_DOCSTRING = 40  # characters; shorter ones ("Return the value.") say nothing under their heading
MAX_SIGNATURE = 300  # characters; longer ones are cut to "..."

# Parts of the standard library that distributions package apart or leave out: without them the documents are the
# same on every machine with the same version of Python.
_OPTIONAL_MODULES = {"distutils", "ensurepip", "idlelib", "lib2to3", "test", "tkinter", "turtledemo", "venv"}
_SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "tests", "test", "testing", "encodings"}
_SKIPPED_FOLDERS |= {"idle_test", "examples", "benchmarks", "distutils"}


@dataclass(frozen=True)
class Document:
    """A piece of documentation: its qualified name and its text."""

    name: str
    text: str


@dataclass(frozen=True)
class _Entry:
    """A docstring under its heading, before duplicates are dropped. `owner` is the document it belongs to."""

    owner: str
    heading: str
    docstring: str


def builtin_texts(name: str, split: str = "train") -> list[str]:
    """Documents of a built-in data set, sorted by qualified name.

    Args:
        name: "python-docs" or "numeric-docs".
        split: "train" (90 %), "validation" (5 %) or "test" (5 %).

    Raises:
        ValueError: unknown name or split.
        FileNotFoundError: the sources of the standard library or of a package are not installed.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}")
    return [document.text for document in documents(name) if split_of(document.name) == split]


@functools.cache
def documents(name: str) -> tuple[Document, ...]:
    """All documents of a built-in data set, sorted by qualified name. Raises as `builtin_texts`."""
    if name == "python-docs":
        entries = [*_topic_entries(), *_package_entries(_standard_library())]
    elif name == "numeric-docs":
        entries = _package_entries(file for package in NUMERIC_PACKAGES for file in _installed_package(package))
    else:
        raise ValueError(f"{name!r} is not a built-in data set: {', '.join(BUILTIN_NAMES)}")
    return tuple(_assemble(entries))


def split_of(name: str) -> str:
    """The split of a document: a function of its name alone, so that it stays when others come or go."""
    fraction = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    return "validation" if fraction < 0.05 else "test" if fraction < 0.10 else "train"


def _assemble(entries: Iterable[_Entry]) -> Iterator[Document]:
    """Join the entries of each owner, every docstring once."""
    sections: dict[str, list[str]] = {}
    seen: set[str] = set()
    for entry in entries:
        # Letters and digits only: the same sentence in other dress is the same text.
        content = re.sub(r"[\W_]+", " ", entry.docstring.lower()).strip()
        if len(entry.docstring) < MIN_DOCSTRING or content in seen:
            continue
        seen.add(content)
        sections.setdefault(entry.owner, []).append(f"{entry.heading}\n\n{entry.docstring}")
    for name, parts in sorted(sections.items()):
        yield Document(name, "\n\n\n".join(parts) + "\n")


def _topic_entries() -> Iterator[_Entry]:
    """The chapters of the language reference that `help()` shows."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise FileNotFoundError("this Python has no pydoc_data.topics: install its full standard library") from error
    for topic, text in sorted(topics.items()):
        title, underline, body = text.strip().partition("\n***")
        body = body.lstrip("*") if underline else title
        yield _Entry(f"topics.{topic}", title.strip() if underline else topic, body.strip("\n").rstrip())


def _standard_library() -> Iterator[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(sys.stdlib_module_names - _OPTIONAL_MODULES)
    files = [file for name in names if not name.startswith("_sysconfigdata") for file in _module_files(root, name)]
    if not files:
        raise FileNotFoundError(f"this Python has no sources of its standard library in {root}")
    yield from files


def _installed_package(name: str) -> Iterator[tuple[str, Path]]:
    spec = importlib.util.find_spec(name)  # finds a top-level package without importing it
    if spec is None or not spec.origin:
        raise FileNotFoundError(f"numeric-docs reads the documentation inside {name}, which is not installed")
    yield from _module_files(Path(spec.origin).parent.parent, name)


def _module_files(root: Path, name: str) -> Iterator[tuple[str, Path]]:
    """(qualified module name, file) of a top-level module or package below `root`, sorted, without its tests."""
    if (root / f"{name}.py").is_file():
        yield name, root / f"{name}.py"
    for path in sorted((root / name).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED_FOLDERS.isdisjoint(parts) and not re.match(r"test_|conftest|.*_test$", path.stem):
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def _package_entries(files: Iterable[tuple[str, Path]]) -> list[_Entry]:
    """The docstrings of modules, sorted by the name under which each is published."""
    trees = {name: (ast.parse(path.read_bytes()), path.name == "__init__.py") for name, path in files}
    published = _published_names(trees)
    entries = [
        entry for module, (tree, _) in trees.items() for entry in _module_entries(module, tree, published)
    ]
    return sorted(entries, key=lambda entry: entry.owner)  # stable: methods stay in the order of the source


def _published_names(trees: dict[str, tuple[ast.Module, bool]]) -> dict[str, str]:
    """Where a package hands on what a private module defines: `json.decoder.JSONDecoder` -> `json.JSONDecoder`.

    Follows the `from ... import` statements of the modules without executing them.
    """
    origins: dict[str, str] = {}  # name as imported -> name it stands for
    for module, (tree, is_package) in trees.items():
        for node in _statements(tree.body):
            if not isinstance(node, ast.ImportFrom):
                continue
            base = module.split(".")
            base = base[: len(base) - node.level + is_package] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                if alias.name != "*":
                    origins[f"{module}.{alias.asname or alias.name}"] = f"{source}.{alias.name}"
                elif source in trees:
                    for name in _public_names(trees[source][0]):
                        origins.setdefault(f"{module}.{name}", f"{source}.{name}")
    published: dict[str, str] = {}
    for public, origin in origins.items():
        for _ in range(8):  # a name may be handed on several times
            origin = origins.get(origin, origin)
        if public.split(".")[0] == origin.split(".")[0] and _rank_name(public) < _rank_name(origin):
            published[origin] = min(published.get(origin, public), public, key=_rank_name)
    return published


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that importing a module runs, on every branch of its `if` and `try`."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            for name in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(node, name, []))
            for handler in getattr(node, "handlers", []):
                yield from _statements(handler.body)


def _rank_name(name: str) -> tuple[bool, int, str]:
    """Public before private, short before long."""
    return "._" in f".{name}", name.count("."), name


def _public_names(tree: ast.Module) -> list[str]:
    """What `from module import *` brings: a literal `__all__`, or every definition without an underscore."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(getattr(t, "id", "") == "__all__" for t in node.targets):
            if isinstance(node.value, ast.List | ast.Tuple):
                return [item.value for item in node.value.elts if isinstance(getattr(item, "value", 0), str)]
    definitions = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return [node.name for node in tree.body if isinstance(node, definitions) and not node.name.startswith("_")]


def _module_entries(module: str, tree: ast.Module, published: dict[str, str]) -> Iterator[_Entry]:
    if docstring := ast.get_docstring(tree):
        yield _Entry(module, f"module {module}", docstring)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = published.get(f"{module}.{node.name}", f"{module}.{node.name}")
            yield from _definition_entries(name, node, owner=name)
        elif added := _added_docstring(node):
            name = published.get(added[0], added[0])
            yield _Entry(name, name, added[1])


def _definition_entries(
    name: str, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, owner: str
) -> Iterator[_Entry]:
    """The docstring of a function; of a class, and those of its methods and inner classes."""
    docstring = ast.get_docstring(node)
    if docstring:
        yield _Entry(owner, _heading(name, node), docstring)
    if isinstance(node, ast.ClassDef):
        for child in node.body:
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield from _definition_entries(f"{name}.{child.name}", child, owner)


def _heading(name: str, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    """`json.dumps(obj, *, skipkeys=False, ...)`, `class json.JSONEncoder`, `async asyncio.sleep(delay)`."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {name}({bases})" if bases else f"class {name}"
    decorators = {ast.unparse(decorator).split(".")[-1] for decorator in node.decorator_list}
    if not decorators.isdisjoint({"property", "cached_property"}):
        return f"property {name}"
    arguments = node.args
    for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]:
        argument.annotation = None
    for argument in (arguments.vararg, arguments.kwarg):
        if argument:
            argument.annotation = None
    signature = ast.unparse(arguments)
    if len(signature) > MAX_SIGNATURE:
        signature = signature[:MAX_SIGNATURE].rpartition(", ")[0] + ", ..."
    return f"{'async ' * isinstance(node, ast.AsyncFunctionDef)}{name}({signature})"


def _added_docstring(node: ast.stmt) -> tuple[str, str] | None:
    """(name, docstring) of `add_newdoc("module", "name", "docstring")`: how numpy documents what is written in C."""
    if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        return None
    if getattr(node.value.func, "id", "") != "add_newdoc":
        return None
    values = [argument.value if isinstance(argument, ast.Constant) else argument for argument in node.value.args]
    match values:
        case [str(module), str(name), str(docstring), *_]:
            return f"{module}.{name}", inspect.cleandoc(docstring)
        case [str(module), str(name), ast.Tuple(elts=[ast.Constant(value=str(method)), ast.Constant(value=str(doc))])]:
            return f"{module}.{name}.{method}", inspect.cleandoc(doc)
    return None
