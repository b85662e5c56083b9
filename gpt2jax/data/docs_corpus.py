"""Texts that are on every machine that runs gpt2jax: the documentation inside installed Python sources.

* `python-docs`: Python's language reference (`pydoc_data.topics`) and the docstrings of the standard library;
* `numeric-docs`: the docstrings of numpy, jax, flax and optax.

A document is a language topic, a module's docstring, a function, or a class with its methods; each docstring
stands under a heading with the signature, as in a printed reference. Sources are parsed, never imported, so
the result depends on the versions of Python and of the packages alone. A docstring that occurs twice is kept
once, a document goes to a split by a hash of its name, and what is held out repeats nothing that is trained
on.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import gc
import hashlib
import importlib.util
import inspect
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt2jax.utils.validation import must_be, unknown_name

SPLITS: tuple[str, ...] = ("train", "validation", "test")
BUILTIN_NAMES = ("python-docs", "numeric-docs")
NUMERIC_PACKAGES = ("numpy", "jax", "flax", "optax")
MIN_DOCSTRING = 40  # characters; shorter ones ("Return the value.") say nothing under their heading
MAX_SIGNATURE = 300  # characters; longer ones end in "..."
MIN_PARAGRAPH = 80  # characters; shorter paragraphs do not count as repeated
MAX_REPEATED = 0.1  # fraction of a held-out document that may also be in training documents

# Parts of the standard library that some distributions package apart or leave out: without them the documents
# are the same on every machine with the same version of Python.
_OPTIONAL_MODULES = {"distutils", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtledemo", "venv"}
_NOT_DOCUMENTATION = {"test", "tests", "testing", "idle_test", "internal_test_util", "examples", "benchmarks"}
_SKIPPED_FOLDERS = _NOT_DOCUMENTATION | {
    "encodings",
    "__pycache__",
    "site-packages",
    "dist-packages",
    "distutils",
}

_NAME = "\0"
_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Definition = _Function | ast.ClassDef


@dataclass(frozen=True)
class Document:
    """A document: its qualified name, its text, and the split that it belongs to."""

    name: str
    text: str
    split: str


@dataclass(frozen=True)
class _Entry:
    """A docstring and its heading. `root` is the definition at the top of a module that it belongs to.

    The heading has `_NAME` instead of the root, since the published name is known only when all modules are parsed.
    """

    root: str
    heading: str
    docstring: str


@dataclass(frozen=True)
class _Module:
    """The needed parts of a parsed module; the syntax trees of all of jax at once would make Python slow."""

    entries: Sequence[_Entry]
    imports: Sequence[tuple[str, str]]  # qualified name here, qualified name there
    reexported: frozenset[str]  # qualified names of the imports that are meant for users of the module
    star_imports: Sequence[str]
    public: Sequence[str]  # what `from module import *` brings


def builtin_texts(name: str, split: str = "train") -> list[str]:
    """Return the documents of a built-in data set, sorted by qualified name.

    Args:
        name: "python-docs" or "numeric-docs".
        split: "train" (90 %), "validation" (5 %) or "test" (5 %).

    Raises:
        ValueError: unknown name or split.
        FileNotFoundError: the sources of the standard library or of a package are not installed.
    """
    if split not in SPLITS:
        raise ValueError(must_be("split", f"one of {', '.join(SPLITS)}", split))
    return [document.text for document in documents(name) if document.split == split]


@functools.cache
def documents(name: str) -> tuple[Document, ...]:
    """Return all documents of a built-in data set, sorted by qualified name. Raises as `builtin_texts`."""
    if name == "python-docs":
        entries = [*_topic_entries(), *_entries(_standard_library())]
    elif name == "numeric-docs":
        entries = _entries(file for package in NUMERIC_PACKAGES for file in _installed_package(package))
    else:
        raise ValueError(unknown_name("built-in data set", name, BUILTIN_NAMES))
    return tuple(_without_leaks(list(_assemble(entries))))


def split_of(name: str) -> str:
    """Return the split of a document: a function of its name alone, so that it stays when others come or go."""
    fraction = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    return "validation" if fraction < 0.05 else "test" if fraction < 0.10 else "train"


def _assemble(entries: Iterable[_Entry]) -> Iterator[Document]:
    """Join the entries of each definition at the top of a module, every docstring once."""
    sections: dict[str, list[str]] = {}
    seen: set[str] = set()
    for entry in entries:
        content = _content(entry.docstring)
        if len(entry.docstring) < MIN_DOCSTRING or content in seen:
            continue
        seen.add(content)
        heading = entry.heading.replace(_NAME, entry.root)
        sections.setdefault(entry.root, []).append(f"{heading}\n\n{entry.docstring}")
    for name, parts in sorted(sections.items()):
        yield Document(name, "\n\n\n".join(parts) + "\n", split_of(name))


def _without_leaks(every: list[Document]) -> Iterator[Document]:
    """Leave out held-out documents that repeat more than MAX_REPEATED from training documents word for word.

    Documentation repeats itself: chapters include others, functions share the description of their arguments.
    """
    trained = {
        key for document in every if document.split == "train" for key, _ in _paragraphs(document.text)
    }
    for document in every:
        if document.split != "train":
            repeated = sum(length for key, length in _paragraphs(document.text) if key in trained)
            if repeated > MAX_REPEATED * len(document.text):
                continue
        yield document


def _paragraphs(text: str) -> Iterator[tuple[str, int]]:
    """Yield (content, number of characters) of the paragraphs of at least MIN_PARAGRAPH characters."""
    for paragraph in re.split(r"\n\s*\n", text):
        content = _content(paragraph)
        if len(content) >= MIN_PARAGRAPH:
            yield content, len(paragraph)


def _content(text: str) -> str:
    """Return letters and digits only, so that the same sentence in another layout is the same text."""
    return re.sub(r"[\W_]+", " ", text.lower()).strip()


def _topic_entries() -> Iterator[_Entry]:
    """Yield the chapters of the language reference that `help()` shows."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise FileNotFoundError("python-docs needs pydoc_data: install Python's whole library") from error
    for topic, text in sorted(topics.items()):
        title, underline, body = text.strip().partition("\n***")
        body = body.lstrip("*").strip("\n") if underline else text.strip()
        yield _Entry(f"topics.{topic}", title.strip() if underline else topic, body)


def _standard_library() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(sys.stdlib_module_names - _OPTIONAL_MODULES - _NOT_DOCUMENTATION)
    files = [file for name in names for file in _module_files(root, name)]
    if not files:
        raise FileNotFoundError(f"python-docs: the sources of Python's standard library are not in {root}")
    return files


def _installed_package(name: str) -> list[tuple[str, Path]]:
    spec = importlib.util.find_spec(name)  # finds a top-level package without importing it
    if spec is None or not spec.origin:
        raise FileNotFoundError(f"numeric-docs reads the documentation inside {name}, which is not installed")
    return list(_module_files(Path(spec.origin).parent.parent, name))


def _module_files(root: Path, name: str) -> Iterator[tuple[str, Path]]:
    """Yield (qualified name, file) of the modules of a top-level module or package, sorted, without its tests."""
    if (root / f"{name}.py").is_file():
        yield name, root / f"{name}.py"
    for path in sorted((root / name).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED_FOLDERS.isdisjoint(parts) and not re.match(r"test_|conftest|.*_test$", path.stem):
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def _entries(files: Iterable[tuple[str, Path]]) -> list[_Entry]:
    """Return the docstrings of modules, sorted by the name under which each is published."""
    with _paused_collector():
        modules = {name: _parse_module(name, path) for name, path in files}
    published = _published_names(modules)
    entries = [
        _Entry(published.get(entry.root, entry.root), entry.heading, entry.docstring)
        for module in modules.values()
        for entry in module.entries
    ]
    return sorted(entries, key=lambda entry: entry.root)  # stable: methods stay in the order of the source


@contextlib.contextmanager
def _paused_collector() -> Iterator[None]:
    """Keep Python from searching syntax trees for garbage: it took 3.1 of 7.9 s, and counting references frees them."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _parse_module(name: str, path: Path) -> _Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's sources
        tree = ast.parse(path.read_bytes())
    imports, star_imports, reexported = [], [], set()
    is_package = path.name == "__init__.py"
    package = name.split(".") if is_package else name.split(".")[:-1]
    public = _public_names(tree)
    for node in _statements(tree.body):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                if alias.name == "*":
                    star_imports.append(source)
                    continue
                here = f"{name}.{alias.asname or alias.name}"
                imports.append((here, f"{source}.{alias.name}"))
                if is_package or alias.name in (alias.asname, *public) or "._" in source:
                    reexported.add(here)
    return _Module(list(_module_entries(name, tree)), imports, frozenset(reexported), star_imports, public)


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements that importing a module may run: on every branch of its `if` and `try`."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            for name in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(node, name, []))
            for handler in getattr(node, "handlers", []):
                yield from _statements(handler.body)


def _public_names(tree: ast.Module) -> list[str]:
    """Return a literal `__all__`, or every definition without an underscore."""
    for node in tree.body:
        if (
            isinstance(node, ast.Assign)
            and any(getattr(target, "id", "") == "__all__" for target in node.targets)
            and isinstance(node.value, ast.List | ast.Tuple)
        ):
            values = [getattr(item, "value", None) for item in node.value.elts]
            return [value for value in values if isinstance(value, str)]
    names = [node.name for node in tree.body if isinstance(node, _Definition)]
    return [name for name in names if not name.startswith("_")]


def _published_names(modules: dict[str, _Module]) -> dict[str, str]:
    """Map names to those that a package publishes: `json.decoder.JSONDecoder` -> `json.JSONDecoder`.

    Follows the `from ... import` statements without running them. Names that a module computes are not seen;
    for numpy's functions in C, whose documentation is in a file of its own, the package's import of that name decides.
    """
    origins: dict[str, str] = {}
    reexported = set().union(*(module.reexported for module in modules.values()))
    for name, module in modules.items():
        for source in module.star_imports:
            for public in modules[source].public if source in modules else ():
                origins[f"{name}.{public}"] = f"{source}.{public}"
                reexported.add(f"{name}.{public}")
    for module in modules.values():
        origins.update(module.imports)
    published: dict[str, str] = {}
    for public in sorted(reexported):
        origin = public
        for _ in range(8):  # a name may be handed on several times; the bound ends circles
            origin = origins.get(origin, origin)
        same_package = public.split(".")[0] == origin.split(".")[0]
        if same_package and origin not in modules and _name_order(public) < _name_order(origin):
            published[origin] = min(published.get(origin, public), public, key=_name_order)
    for module in modules.values():
        for entry in module.entries:
            short = f"{entry.root.split('.')[0]}.{entry.root.split('.')[-1]}"
            if "._" in entry.root and entry.root not in published and short in origins:
                published[entry.root] = short
    return published


def _name_order(name: str) -> tuple[bool, int, str]:
    """Return a sort key: public before private, short before long."""
    return "._" in f".{name}", name.count("."), name


def _module_entries(module: str, tree: ast.Module) -> Iterator[_Entry]:
    if docstring := ast.get_docstring(tree):
        yield _Entry(module, f"module {_NAME}", docstring)
    for node in tree.body:
        if isinstance(node, _Definition):
            yield from _definition_entries(f"{module}.{node.name}", "", node)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield from _added_docstring(node.value)


def _definition_entries(root: str, path: str, node: _Definition) -> Iterator[_Entry]:
    """Yield the docstrings of a function, or of a class with its methods and inner classes."""
    if docstring := ast.get_docstring(node):
        yield _Entry(root, _heading(path, node), docstring)
    if isinstance(node, ast.ClassDef):
        for child in node.body:
            if isinstance(child, _Definition):
                yield from _definition_entries(root, f"{path}.{child.name}", child)


def _heading(path: str, node: _Definition) -> str:
    """Build a heading such as `json.dumps(obj, *, indent=None)`; `path` is ".method" or empty."""
    name = _NAME + path
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {name}({bases})" if bases else f"class {name}"
    decorators = {ast.unparse(decorator).split(".")[-1] for decorator in node.decorator_list}
    if not decorators.isdisjoint({"property", "cached_property"}):
        return f"property {name}"
    arguments = node.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    for argument in [*named, arguments.vararg, arguments.kwarg]:
        if argument is not None:
            argument.annotation = None
    signature = ast.unparse(arguments)
    if len(signature) > MAX_SIGNATURE:
        signature = signature[:MAX_SIGNATURE].rpartition(", ")[0] + ", ..."
    return f"{'async ' * isinstance(node, ast.AsyncFunctionDef)}{name}({signature})"


def _added_docstring(call: ast.Call) -> Iterator[_Entry]:
    """`add_newdoc("module", "name", "docstring")`: how numpy documents what is written in C."""
    if getattr(call.func, "id", "") != "add_newdoc" or len(call.args) < 3:
        return
    module, name, content = call.args[:3]
    method = ""
    if isinstance(content, ast.Tuple) and len(content.elts) == 2:
        method, content = f".{getattr(content.elts[0], 'value', '')}", content.elts[1]
    values = [getattr(node, "value", None) for node in (module, name, content)]
    if not all(isinstance(value, str) for value in values):
        return
    docstring = inspect.cleandoc(str(values[2]))
    signature = ""
    if declared := re.match(r"\w+(\(.*?\))\n--\n\n", docstring, re.DOTALL):  # how C declares a signature
        signature, docstring = declared[1], docstring[declared.end() :]
    yield _Entry(f"{values[0]}.{values[1]}", f"{_NAME}{method}{signature}", docstring)
