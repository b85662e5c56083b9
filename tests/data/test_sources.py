from __future__ import annotations

import re
from typing import Any

import datasets
import pytest
from sample_files import TEXTS, json_lines, parquet, write

from gpt2jax.data.docs_corpus import SPLITS
from gpt2jax.data.sources import Texts, load_texts
from gpt2jax.utils.notices import Notice

pytestmark = pytest.mark.usefixtures("empty_folder")


def test_limit_and_streaming(tmp_path):
    path = write(tmp_path / "a.jsonl", json_lines(TEXTS) + "broken\n")
    assert load_texts(path, split="all", limit=3) == TEXTS[:3]
    texts = Texts(path, "all")
    stream = iter(texts)
    assert [next(stream) for _ in range(5)] == TEXTS
    with pytest.raises(ValueError, match="line 6 is not JSON"):
        next(stream)
    assert [next(iter(texts)) for _ in range(2)] == TEXTS[:1] * 2  # read anew each time
    assert list(Texts(path, "all", limit=2)) == TEXTS[:2]
    write(path, json_lines(TEXTS))
    assert load_texts(path, split="all", limit=2**70) == TEXTS


@pytest.mark.parametrize("source", ["", None, 3])
def test_what_is_no_source_is_named(source):
    """The empty name is not the working folder."""
    with pytest.raises(
        ValueError, match=re.escape(f"source must be a name or a path, and not empty, got {source!r}")
    ):
        load_texts(source)


@pytest.mark.parametrize("limit", [0, -1, 1.5, True])
def test_wrong_options(tmp_path, limit):
    with pytest.raises(ValueError, match=f"limit must be a positive whole number, or None, got {limit}"):
        load_texts("python-docs", limit=limit)
    with pytest.raises(
        ValueError, match="python-docs: there is no split 'dev'; known: train, validation, test, all"
    ):
        load_texts("python-docs", split="dev")
    with pytest.raises(ValueError, match="documents must be one of file, paragraph, line, got 'word'"):
        load_texts("python-docs", documents="word")
    with pytest.raises(ValueError, match="python-docs has no columns"):
        load_texts("python-docs", text_column="text")


def test_missing_and_unknown_sources(tmp_path):
    for name in (
        "absent.jsonl",
        "corpora/absent.txt",
        "./absent",
        "corpora/x.zip",
        "/absent/folder",
        "a.docx",
    ):
        with pytest.raises(FileNotFoundError, match=f"there is no file or folder {name}"):
            load_texts(name)
    with pytest.raises(
        ValueError, match=r"source must be python-docs, numeric-docs, pubmed, .* got 'wikipedia'"
    ):
        load_texts("wikipedia")
    with pytest.raises(ValueError, match=r"unknown format '.docx'; known are .txt, .jsonl"):
        load_texts(write(tmp_path / "a.docx", "x"))
    write(tmp_path / "c" / "a.docx", "x")
    with pytest.raises(ValueError, match="holds no file of a known format; known are"):
        load_texts(tmp_path / "c")


@pytest.mark.slow
def test_built_in(tmp_path):
    parts = [load_texts("python-docs", split=split) for split in SPLITS]
    assert load_texts("python-docs", split="all") == sum(parts, [])
    assert load_texts("python-docs", limit=2) == parts[0][:2]


def test_folder_saved_by_datasets(tmp_path, papers):
    papers.save_to_disk(str(tmp_path / "d"))
    assert load_texts(tmp_path / "d", split="validation") == [f"valid {i}" for i in range(4)]
    assert len(load_texts(tmp_path / "d", split="all")) == 12
    assert load_texts(tmp_path / "d", split="test", text_column="abstract") == ["short"] * 4
    with pytest.raises(ValueError, match=r"no text column 'pages'; .* article, abstract, pages \(not text\)"):
        load_texts(tmp_path / "d", text_column="pages")
    papers["train"].save_to_disk(str(tmp_path / "single"))
    assert len(load_texts(tmp_path / "single")) == 2  # 4 texts: one each for validation and test


def test_texts_of_dataset_objects(papers):
    valid = [f"valid {i}" for i in range(4)]
    assert load_texts(papers, "validation") == load_texts(papers, "valid") == valid
    assert load_texts(papers, "train[:50%]+test", text_column="abstract") == ["short"] * 6
    assert load_texts(papers["valid"], "all") == load_texts(papers["valid"]["article"], "all") == valid
    assert (
        len(load_texts(papers["valid"])) == 2
    )  # one split: 4 texts, of which one each for validation and test
    streams = datasets.IterableDatasetDict(
        {name: part.to_iterable_dataset() for name, part in papers.items()}
    )
    assert load_texts(streams, "validation[-1:]") == valid[-1:]
    mapped = streams["valid"].map(lambda row: {"text": row["article"] + "!"})
    assert load_texts(mapped, "all") == [text + "!" for text in valid]
    assert load_texts(papers["valid"].with_format("numpy"), "all") == valid
    with pytest.raises(ValueError, match="the DatasetDict: there is no split 'dev'"):
        load_texts(papers, "dev")
    with pytest.raises(ValueError, match="the Column is one column: it has no column 'x'"):
        load_texts(papers["valid"]["article"], text_column="x")
    with pytest.raises(ValueError, match="the DatasetDict is not on the hub"):
        load_texts(papers, revision="main")


def test_texts_of_a_dataset_dict_with_other_names():
    parts: Any = {
        name: datasets.Dataset.from_dict({"text": [f"{name} {i}" for i in range(9)]}) for name in "ab"
    }
    data = datasets.DatasetDict(parts)
    assert load_texts(data, "b[:2]") == ["b 0", "b 1"]
    assert len(load_texts(data, "all")) == 18 and len(load_texts(data)) == 16  # split by content


def test_texts_fingerprint_names_what_never_changes():
    commit = "c" * 40
    assert Texts("my.jsonl").fingerprint is None and Texts("a/b", revision="main").fingerprint is None
    pinned = Texts("a/b", revision=commit).fingerprint
    assert pinned is not None and commit in pinned
    assert pinned != Texts("a/b", "test", revision=commit).fingerprint


def test_texts_refuse_unknown_options():
    with pytest.raises(TypeError, match="there is no setting 'txt_column'; did you mean 'text_column'"):
        load_texts("python-docs", txt_column="text")


def test_files_that_several_sources_name_are_read_once(tmp_path):
    first, second = write(tmp_path / "a.txt", "a"), write(tmp_path / "b.txt", "b")
    (tmp_path / "c.txt").symlink_to(second)
    sources = [second, str(tmp_path / "[ab].txt"), str(tmp_path / "c.txt"), str(tmp_path / "." / "a.txt")]
    with pytest.warns(Notice, match="^named more than once, read only once: .*b.txt, .*c.txt, .*a.txt$"):
        assert load_texts(sources, "all") == ["b", "a"]
    assert load_texts([second, first], "all") == ["b", "a"]


@pytest.mark.parametrize(
    ("options", "formats"),
    [
        ({"documents": "line"}, ".txt, .text"),
        ({"records_field": "data"}, ".jsonl"),
        ({"encoding": "cp1252"}, ".txt, .jsonl"),
    ],
)
def test_options_without_effect_are_named(tmp_path, options, formats):
    ((name, value),) = options.items()
    file = str(parquet(tmp_path / "a.parquet", text=["a"]))
    for source in (file, [file], datasets.Dataset.from_dict({"text": ["a"]})):
        with pytest.warns(Notice, match=f"{name}={value!r} has no effect; it is for files of {formats}"):
            assert load_texts(source, "all", **options) == ["a"]
