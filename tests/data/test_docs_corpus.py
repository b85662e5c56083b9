from __future__ import annotations

import ast
import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2jax.data import docs_corpus
from gpt2jax.data.docs_corpus import BUILTIN_NAMES, SPLITS, Document, builtin_texts, documents, split_of

SIZES = {"python-docs": (1.7e6, 3e6), "numeric-docs": (3.5e6, 8e6)}  # characters


def write(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILTIN_NAMES)
def test_size_and_splits(name):
    every = documents(name)
    low, high = SIZES[name]
    assert low < sum(len(document.text) for document in every) < high
    names = [document.name for document in every]
    assert names == sorted(set(names))
    parts = {split: builtin_texts(name, split) for split in SPLITS}
    assert sum(map(len, parts.values())) == len(every)
    for split in ("validation", "test"):
        assert 0.03 * len(every) < len(parts[split]) < 0.065 * len(every)


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILTIN_NAMES)
def test_held_out_documents_repeat_nothing_that_is_trained_on(name):
    def paragraphs(text: str) -> set[str]:
        return {paragraph.strip() for paragraph in text.split("\n\n") if len(paragraph.strip()) > 200}

    trained = set().union(*map(paragraphs, builtin_texts(name, "train")))
    for split in ("validation", "test"):
        for text in builtin_texts(name, split):
            repeated = sum(map(len, paragraphs(text) & trained))
            assert repeated <= 0.1 * len(text), text[:200]


def test_a_document_that_repeats_others_is_left_out():
    part = (
        "This paragraph is long enough to be told from others, and it stands in two documents word for word."
    )
    every = [
        Document("a", f"a()\n\n{part}\n", "train"),
        Document("b", f"b()\n\n{part.upper()}\n", "test"),
        Document("c", f"c()\n\n{part}\n\n{'Other words. ' * 100}", "test"),
        Document("d", f"d()\n\n{part}\n", "train"),
    ]
    assert [document.name for document in docs_corpus._without_leaks(every)] == ["a", "c", "d"]


@pytest.mark.slow
def test_reads_like_documentation():
    texts = {document.name: document.text for document in documents("python-docs")}
    assert texts["json.dumps"].startswith("json.dumps(obj, *, skipkeys=False, ensure_ascii=True,")
    assert "Serialize ``obj`` to a JSON formatted ``str``." in texts["json.dumps"]
    assert texts["json.JSONDecoder"].startswith("class json.JSONDecoder(object)\n\nSimple JSON")
    assert "json.JSONDecoder.raw_decode(self, s, idx=0)\n\n" in texts["json.JSONDecoder"]
    assert texts["asyncio.sleep"].startswith("async asyncio.sleep(delay, result=None)")
    assert "break_stmt" in texts["topics.break"]
    texts = {document.name: document.text for document in documents("numeric-docs")}
    assert texts["jax.lax.scan"].startswith("jax.lax.scan(f, init, xs=None,")
    assert texts["jax.numpy.arange"].startswith("jax.numpy.arange(start, stop=None,")
    for name in ("numpy.ndarray", "numpy.array_equal", "optax.adamw", "flax.nnx.Linear"):
        assert name in texts


def test_tests_are_no_documentation():
    for name in BUILTIN_NAMES:
        for document in documents(name):
            assert not re.search(r"\.(tests?|conftest|idle_test)\.|\.test_\w+\.\w+$", document.name), (
                document.name
            )


@pytest.mark.slow
def test_same_in_another_process_and_nothing_is_imported():
    code = (
        "import sys, hashlib; from gpt2jax.data.docs_corpus import documents;"
        "print(hashlib.sha256(repr(documents('python-docs')).encode()).hexdigest());"
        "print('antigravity' in sys.modules, 'jax.numpy' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    digest = hashlib.sha256(repr(documents("python-docs")).encode()).hexdigest()
    assert run.stdout.decode().split() == [digest, "False", "False"]


def test_split_depends_on_the_name_alone():
    assert split_of("json.dumps") == split_of("json.dumps")
    names = [f"module.function_{i}" for i in range(10_000)]
    counts = {split: sum(split_of(name) == split for name in names) for split in SPLITS}
    assert counts["train"] == pytest.approx(9000, abs=150)
    assert counts["validation"] == pytest.approx(500, abs=100)
    # A change here would move documents between the splits of published models.
    assert [split_of(name) for name in ("json.dumps", "jax.lax.scan")] == ["train", "train"]


def test_unknown_names():
    with pytest.raises(
        ValueError, match="there is no built-in data set 'docs'; known: python-docs, numeric-docs"
    ):
        builtin_texts("docs")
    with pytest.raises(ValueError, match="split must be one of train, validation, test, got 'dev'"):
        builtin_texts("python-docs", "dev")


def test_missing_package_is_named(monkeypatch):
    with pytest.raises(FileNotFoundError, match="no_such_package_here, which is not installed"):
        docs_corpus._installed_package("no_such_package_here")
    monkeypatch.setattr(docs_corpus.sysconfig, "get_path", lambda name: "/nowhere")
    with pytest.raises(FileNotFoundError, match="sources of Python's standard library are not in"):
        docs_corpus._standard_library()


LONG = "It does what its name says, and does it at some length."


def test_names_are_those_published(tmp_path):
    root = tmp_path
    write(
        root / "pkg" / "__init__.py", "from pkg._core import *\nfrom ._other import helper as public_helper\n"
    )
    write(
        root / "pkg" / "_core.py",
        f'__all__ = ["f"]\ndef f(a: int, *, b=1):\n    """{LONG} F."""\ndef g():\n    """{LONG} G."""\n'
        f'class C(Base):\n    """{LONG} C."""\n    @property\n    def p(self):\n        """{LONG} P."""\n',
    )
    write(root / "pkg" / "_other.py", f'async def helper(*args: int):\n    """{LONG} H."""\n')
    write(root / "pkg" / "tests" / "a.py", f'"""{LONG} T."""')
    write(root / "pkg" / "test_x.py", f'"""{LONG} T."""')
    entries = docs_corpus._entries(docs_corpus._module_files(root, "pkg"))
    texts = {document.name: document.text for document in docs_corpus._assemble(entries)}
    assert texts == {
        "pkg.f": f"pkg.f(a, *, b=1)\n\n{LONG} F.\n",
        "pkg._core.g": f"pkg._core.g()\n\n{LONG} G.\n",
        "pkg._core.C": f"class pkg._core.C(Base)\n\n{LONG} C.\n\n\nproperty pkg._core.C.p\n\n{LONG} P.\n",
        "pkg.public_helper": f"async pkg.public_helper(*args)\n\n{LONG} H.\n",
    }


def test_short_and_repeated_docstrings_are_left_out(tmp_path):
    write(
        tmp_path / "m.py",
        f'def a():\n    """{LONG}"""\ndef b():\n    """{LONG.upper()}!"""\ndef c():\n    """Short."""\n',
    )
    entries = docs_corpus._entries(docs_corpus._module_files(tmp_path, "m"))
    assert [document.name for document in docs_corpus._assemble(entries)] == ["m.a"]


def test_documentation_added_to_what_is_written_in_c():
    source = f'add_newdoc("numpy._core.x", "f", """f(a, /)\n--\n\n{LONG}""")'
    (entry,) = docs_corpus._module_entries("numpy._core.add", ast.parse(source))
    assert entry.root == "numpy._core.x.f"
    assert entry.heading.replace(docs_corpus._NAME, "numpy.f") == "numpy.f(a, /)"
    assert entry.docstring == LONG
    (entry,) = docs_corpus._module_entries("m", ast.parse(f'add_newdoc("n", "C", ("method", "{LONG}"))'))
    assert entry.heading.replace(docs_corpus._NAME, "n.C") == "n.C.method"


def test_long_signatures_are_cut():
    arguments = ", ".join(f"argument_{i}=None" for i in range(50))
    (entry,) = docs_corpus._module_entries("m", ast.parse(f'def f({arguments}):\n    """{LONG}"""'))
    assert len(entry.heading) < docs_corpus.MAX_SIGNATURE + 20
    assert entry.heading.endswith("=None, ...)")
