from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

from gpt2jax.data import hub as hub_module
from gpt2jax.data import sources
from gpt2jax.data.sources import load_texts, pin_revision, split_texts

TEXTS = ["first text", 'second, with "quotes"\nand a line', "", "日本語 😀", "  spaces  "]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def json_lines(texts: list[str], column: str = "text") -> str:
    return "".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts))


def parquet(path: Path, **columns: list) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Nothing of the machine is found by chance."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(sources.DATA_VARIABLE, raising=False)


# Formats


def test_json_lines(tmp_path):
    path = write(tmp_path / "a.jsonl", json_lines(TEXTS) + "\n\n")
    assert load_texts(path, split="all") == TEXTS
    assert load_texts(str(path), split="all") == TEXTS
    assert load_texts(write(tmp_path / "b.json", json_lines(TEXTS)), split="all") == TEXTS
    assert load_texts(write(tmp_path / "c.ndjson", '"x"\n"y"\n'), split="all") == ["x", "y"]


@pytest.mark.parametrize(
    "value",
    [TEXTS, [{"text": text} for text in TEXTS], {"text": TEXTS, "id": [1, 2, 3, 4, 5]}],
    ids=["strings", "objects", "columns"],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_json(tmp_path, value, indent):
    assert load_texts(write(tmp_path / "a.json", json.dumps(value, indent=indent)), split="all") == TEXTS


@pytest.mark.parametrize(("name", "mark"), [("a.csv", ","), ("a.tsv", "\t")])
def test_csv(tmp_path, name, mark):
    quoted = ['"' + text.replace('"', '""') + '"' for text in TEXTS]
    content = f"id{mark}text\r\n" + "".join(f"{i}{mark}{text}\r\n" for i, text in enumerate(quoted))
    assert load_texts(write(tmp_path / name, content), split="all", text_column="text") == TEXTS
    long = "x" * 200_000
    path = write(tmp_path / ("long" + name), f"text\n{long}\n")
    assert load_texts(path, split="all") == [long]


def test_parquet(tmp_path):
    path = parquet(tmp_path / "a.parquet", id=list(range(5)), text=TEXTS)
    assert load_texts(path, split="all") == TEXTS
    lists = parquet(tmp_path / "b.parquet", article_text=[["one .", "two ."], [], None])
    assert load_texts(lists, split="all") == ["one .\ntwo .", "", ""]


def test_plain_text(tmp_path):
    book = "\ufeffChapter 1\r\n\r\nOnce upon\r\na time.\r\n<|endoftext|>\r\nChapter 2\r\n\r\n\r\nThe end."
    path = write(tmp_path / "book.txt", book)
    assert load_texts(path, split="all") == ["Chapter 1\n\nOnce upon\na time.\n", "Chapter 2\n\n\nThe end."]
    paragraphs = ["Chapter 1", "Once upon\na time.", "Chapter 2", "The end."]
    assert load_texts(path, split="all", documents="paragraph") == paragraphs
    lines = ["Chapter 1", "Once upon", "a time.", "<|endoftext|>", "Chapter 2", "The end."]
    assert load_texts(path, split="all", documents="line") == lines
    inline = write(tmp_path / "inline.txt", "a<|endoftext|>b<|endoftext|><|endoftext|>c")
    assert load_texts(inline, split="all") == ["a", "b", "c"]


def test_json_lines_named_txt(tmp_path):
    """The files of pubmed-dataset.zip."""
    rows = [{"article_id": "a", "article_text": ["s 1 .", "s 2 ."], "abstract_text": ["<S> x </S>"]}]
    path = write(tmp_path / "a.txt", "\n" + "".join(json.dumps(row) + "\n" for row in rows))
    assert load_texts(path, split="all") == ["s 1 .\ns 2 ."]
    assert load_texts(path, split="all", text_column="abstract_text") == ["<S> x </S>"]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.txt"])
def test_compressed(tmp_path, suffix, name):
    plain = tmp_path / name
    if name.endswith("parquet"):
        parquet(plain, text=TEXTS)
    else:
        write(plain, json_lines(TEXTS))
    data = plain.read_bytes()
    packers = {
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
        ".zst": lambda data: pyarrow.compress(data, codec="zstd", asbytes=True),
    }
    if suffix == ".zst":
        with pyarrow.CompressedOutputStream(str(tmp_path / (name + suffix)), "zstd") as stream:
            stream.write(data)
    else:
        write(tmp_path / (name + suffix), packers[suffix](data))
    assert load_texts(tmp_path / (name + suffix), split="all") == TEXTS


# Columns


@pytest.mark.parametrize("column", ["text", "article", "article_text", "content", "body", "document", "only"])
def test_column_is_found(tmp_path, column):
    path = write(tmp_path / "a.jsonl", json_lines(["x", "y"], column))
    assert load_texts(path, split="all") == ["x", "y"]


def test_usual_column_comes_first(tmp_path):
    path = write(tmp_path / "a.jsonl", json.dumps({"abstract": "no", "title": "no", "article": "yes"}))
    assert load_texts(path, split="all") == ["yes"]
    assert load_texts(path, split="all", text_column="title") == ["no"]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_unclear_or_wrong_column_lists_the_columns(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        write(path, '{"title": "a", "summary": "b"}\n')
    elif kind == "csv":
        write(path, "title,summary\na,b\n")
    else:
        parquet(path, title=["a"], summary=["b"])
    with pytest.raises(ValueError, match="say which column .* title, summary"):
        load_texts(path, split="all")
    with pytest.raises(ValueError, match="no text column 'abstract'; its columns: title, summary"):
        load_texts(path, split="all", text_column="abstract")


def test_column_that_is_not_text(tmp_path):
    path = parquet(tmp_path / "a.parquet", id=[1], text=["a"])
    with pytest.raises(ValueError, match=r"no text column 'id'; its columns: id \(not text\), text"):
        load_texts(path, split="all", text_column="id")
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": 5}\n')
    with pytest.raises(ValueError, match=r"a.jsonl, line 2: column 'text' holds int"):
        load_texts(path, split="all")
    path = write(tmp_path / "b.jsonl", '{"text": "a"}\n{"other": "b"}\n')
    with pytest.raises(ValueError, match=r"b.jsonl, line 2: no column 'text'; its columns: other"):
        load_texts(path, split="all")
    path = write(tmp_path / "c.jsonl", "[1]\n")
    with pytest.raises(ValueError, match="c.jsonl, line 1: a text or an object is expected, not list"):
        load_texts(path, split="all")
    with pytest.raises(ValueError, match="plain text: it has no column 'text'"):
        load_texts(write(tmp_path / "d.txt", "words"), split="all", text_column="text")


def test_null_is_an_empty_text(tmp_path):
    assert load_texts(write(tmp_path / "a.jsonl", '{"text": null}\n{"text": "a"}'), split="all") == ["", "a"]


# Damage


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_undecodable_bytes_are_located(tmp_path, bom):
    path = write(tmp_path / "a.txt", bom + b"abc\xffdef\n")
    with pytest.raises(
        ValueError, match=rf"a.txt is not UTF-8: byte 0xff at offset {len(bom) + 3} \(line 1\)"
    ):
        load_texts(path)
    path = write(tmp_path / "b.txt", bom + "ä\n".encode() + b"caf\xe9\n")
    with pytest.raises(ValueError, match=rf"byte 0xe9 at offset {len(bom) + 6} \(line 2\)"):
        load_texts(path)


def test_utf16_is_named(tmp_path):
    with pytest.raises(ValueError, match="UTF-16"):
        load_texts(write(tmp_path / "a.txt", "text".encode("utf-16")))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "a.jsonl, line 2 is not JSON"),
        ("a.json", '[{"text": "a"}', "a.json is not JSON"),
        ("a.csv", 'text\n"open', "a.csv, line .* unexpected end"),
        ("a.parquet", "no parquet at all", "a.parquet is not a Parquet file"),
        ("a.zip", "no zip", "a.zip is not a zip archive"),
        ("a.jsonl.gz", "no gzip", "a.jsonl.gz is damaged"),
        ("a.jsonl.bz2", "no bzip", "a.jsonl.bz2 is damaged"),
        ("a.jsonl.xz", "no xz", "a.jsonl.xz is damaged"),
        ("a.jsonl.zst", "no zst", "a.jsonl.zst is damaged"),
        ("a.txt.gz", gzip.compress(b"many words " * 999)[:50], "a.txt.gz is damaged"),
    ],
)
def test_damaged_files(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_texts(write(tmp_path / name, content), split="all")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.csv"])
def test_empty_files(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} has no texts$"):
        load_texts(write(tmp_path / name, ""), split="all")
    with pytest.raises(ValueError, match=f"{name} has no texts in its train split"):
        load_texts(write(tmp_path / name, "\n"))


# Splits


@pytest.mark.parametrize(
    "names",
    [
        ("train.jsonl", "validation.jsonl", "test.jsonl"),
        ("train.txt", "val.txt", "test.txt"),
        ("my-train.jsonl", "my-dev.jsonl", "my.test.jsonl"),
        ("train-00000-of-00001.json", "valid-00000-of-00001.json", "test-00000-of-00001.json"),
        ("train/a.jsonl", "valid/a.jsonl", "test/a.jsonl"),
        ("data/Training/a.jsonl", "data/eval/a.jsonl", "data/testing/a.jsonl"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_splits_by_name(tmp_path, names, packed):
    folder = tmp_path / "papers"
    for name, split in zip(names, sources.SPLITS, strict=True):
        write(folder / name, json_lines([split, split + " 2"]))
    write(folder / "vocab", "ignored")
    write(folder / "notes.jsonl", json_lines(["belongs to no split"]))
    write(folder / ".hidden" / "train.jsonl", json_lines(["hidden"]))
    source = folder
    if packed:
        source = tmp_path / "papers.zip"
        with zipfile.ZipFile(source, "w") as archive:
            for file in folder.rglob("*.*"):
                if file.is_file():
                    archive.write(file, file.relative_to(tmp_path))
            archive.writestr("__MACOSX/papers/._train.jsonl", b"\x00")
    for split in sources.SPLITS:
        assert load_texts(source, split=split) == [split, split + " 2"]
    assert load_texts(source, split="all", limit=3) == ["train", "train 2", "validation"]


def test_files_are_read_in_order_of_their_names(tmp_path):
    for number in (2, 0, 1):
        write(tmp_path / "c" / f"train-0000{number}-of-00003.jsonl", json_lines([str(number)]))
    assert load_texts(tmp_path / "c") == ["0", "1", "2"]


def test_missing_split_names_those_there_are(tmp_path):
    write(tmp_path / "c" / "train.jsonl", json_lines(TEXTS))
    with pytest.raises(ValueError, match="no test split: by its names it holds train"):
        load_texts(tmp_path / "c", split="test")
    with pytest.raises(ValueError, match="no validation split: by its names it holds train"):
        load_texts(tmp_path / "c" / "train.jsonl", split="validation")
    assert load_texts(tmp_path / "c" / "train.jsonl", split="train") == TEXTS


@pytest.mark.parametrize(
    "name", ["contest.jsonl", "training_of_dogs_in_general.jsonl", "latest-test-of-x.jsonl"]
)
def test_words_inside_a_name_tell_nothing(tmp_path, name):
    path = write(tmp_path / name, json_lines([f"text {i}" for i in range(40)]))
    if name.startswith("training"):
        assert len(load_texts(path)) == 40  # at its begin a word does tell
    else:
        assert len(load_texts(path)) == 36


@pytest.mark.parametrize("number", [3, 19, 100, 399, 400, 5000])
def test_split_by_hash_is_a_partition(number):
    texts = [f"text {i}" for i in range(number)]
    parts = {split: list(split_texts(iter(texts), split)) for split in sources.SPLITS}
    assert sorted(sum(parts.values(), [])) == sorted(texts)
    for split, share in (("train", 0.9), ("validation", 0.05), ("test", 0.05)):
        assert parts[split]
        assert abs(len(parts[split]) - share * number) <= max(2, 0.02 * number)
        assert parts[split] == [text for text in texts if text in set(parts[split])]  # order kept
    if number >= 400:  # a text's split is a matter of the text alone
        fewer = list(split_texts(texts[: number - 1] + ["other"] * 10, "test"))
        assert set(parts["test"]) - set(fewer) <= {texts[-1]}


@pytest.mark.parametrize("number", [10, 600])
def test_equal_texts_are_in_one_split(number):
    texts = [f"text {i % (number // 2)}" for i in range(number)]
    parts = [set(split_texts(iter(texts), split)) for split in sources.SPLITS]
    assert all(parts)
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])


def test_a_book_is_cut_by_position(tmp_path):
    book = "".join(f"This is line {i} of the book.\n" for i in range(1000))
    path = write(tmp_path / "book.txt", book)
    parts = [load_texts(path, split=split) for split in sources.SPLITS]
    assert [len(part) for part in parts] == [1, 1, 1]
    assert "".join(part[0] for part in parts) == book
    assert all(part[0].endswith(".\n") for part in parts)
    assert len(parts[0][0]) == pytest.approx(0.9 * len(book), rel=0.01)
    assert len(parts[1][0]) == pytest.approx(0.05 * len(book), rel=0.05)


@pytest.mark.parametrize("text", ["word " * 1000, "x" * 1000, "ab"])
def test_cuts_lose_nothing(text):
    assert "".join("".join(split_texts([text], split)) for split in sources.SPLITS) == text


# Options


def test_limit_and_streaming(tmp_path):
    path = write(tmp_path / "a.jsonl", json_lines(TEXTS) + "broken\n")
    assert load_texts(path, split="all", limit=3) == TEXTS[:3]
    stream = load_texts(path, split="all", streaming=True)
    assert isinstance(stream, Iterator)
    assert [next(stream) for _ in range(5)] == TEXTS
    with pytest.raises(ValueError, match="line 6 is not JSON"):
        next(stream)
    assert list(load_texts(path, split="all", streaming=True, limit=2)) == TEXTS[:2]


@pytest.mark.parametrize("source", ["", None, ["a text"]])
def test_what_is_no_source_is_named(source):
    """The empty name is not the working folder."""
    with pytest.raises(ValueError, match=re.escape(f"source={source!r} must be a name or a path")):
        load_texts(source)


@pytest.mark.parametrize("limit", [0, -1, 1.5, True])
def test_wrong_options(tmp_path, limit):
    with pytest.raises(ValueError, match=f"limit={limit} is not a positive"):
        load_texts("python-docs", limit=limit)
    with pytest.raises(ValueError, match="split='dev' is not one of train, validation, test, all"):
        load_texts("python-docs", split="dev")
    with pytest.raises(ValueError, match="documents='word' is not one of file, paragraph, line"):
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
        ValueError, match="'wikipedia' is no data set: give python-docs, numeric-docs, pubmed"
    ):
        load_texts("wikipedia")
    with pytest.raises(ValueError, match=r"unknown format '.docx'; known are .txt, .jsonl"):
        load_texts(write(tmp_path / "a.docx", "x"))
    write(tmp_path / "c" / "a.docx", "x")
    with pytest.raises(ValueError, match="holds no file of a known format; known are"):
        load_texts(tmp_path / "c")


def test_built_in(tmp_path):
    parts = [load_texts("python-docs", split=split) for split in sources.SPLITS]
    assert load_texts("python-docs", split="all") == sum(parts, [])
    assert load_texts("python-docs", limit=2) == parts[0][:2]


# `datasets`


@pytest.fixture
def papers() -> datasets.DatasetDict:
    return datasets.DatasetDict(
        {
            name: datasets.Dataset.from_dict(
                {"article": [f"{name} {i}" for i in range(4)], "abstract": ["short"] * 4, "pages": [1] * 4}
            )
            for name in ("train", "valid", "test")
        }
    )


def test_folder_saved_by_datasets(tmp_path, papers):
    papers.save_to_disk(str(tmp_path / "d"))
    assert load_texts(tmp_path / "d", split="validation") == [f"valid {i}" for i in range(4)]
    assert len(load_texts(tmp_path / "d", split="all")) == 12
    assert load_texts(tmp_path / "d", split="test", text_column="abstract") == ["short"] * 4
    with pytest.raises(ValueError, match=r"no text column 'pages'; .* article, abstract, pages \(not text\)"):
        load_texts(tmp_path / "d", text_column="pages")
    papers["train"].save_to_disk(str(tmp_path / "single"))
    assert len(load_texts(tmp_path / "single")) == 2  # 4 texts: one each for validation and test


COMMIT, OTHER = "c" * 40, "0" * 40


class Hub:
    """The hub's client: files at one commit, of which what is fetched lies in a folder; `asked` says what was."""

    def __init__(self, folder: Path):
        self.folder, self.online, self.asked = folder / "snapshots" / COMMIT, True, []
        self.folder.mkdir(parents=True)
        for split in sources.SPLITS:
            for name, prefix in (("pubmed", ""), ("arxiv", "partial-")):
                path = self.folder / name / f"{prefix}{split}" / "0000.parquet"
                path.parent.mkdir(parents=True)
                parquet(path, article=[f"{name} {split} {i} .\nend ." for i in range(3)], abstract=["a"] * 3)

    def snapshot_download(
        self, hub_id, *, repo_type, revision, allow_patterns, local_files_only=False
    ) -> str:
        assert repo_type == "dataset"
        self.asked.append((hub_id, revision, allow_patterns[0]))
        if not self.online and not local_files_only:
            raise ConnectionError("Couldn't reach\nthe hub")
        return str(self.folder if revision != OTHER else self.folder.with_name(OTHER))

    def HfFileSystem(self):
        if not self.online:
            raise ConnectionError("Couldn't reach\nthe hub")
        return self

    def glob(self, pattern: str) -> list[str]:
        before, _, pattern = pattern.partition("@")
        assert before == "datasets/armanc/scientific_papers"
        return [
            f"{before}@{path.relative_to(self.folder.parent)}" for path in self.folder.parent.glob(pattern)
        ]

    def open(self, path: str, mode: str):
        self.asked.append(path)
        return open(self.folder.parent / path.partition("@")[2], mode)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    made = Hub(tmp_path)
    for name in ("snapshot_download", "HfFileSystem"):
        monkeypatch.setattr(huggingface_hub, name, getattr(made, name))
    few = {name: dict.fromkeys(counts, 3) for name, counts in hub_module.PAPERS_TEXTS.items()}
    monkeypatch.setattr(hub_module, "PAPERS_TEXTS", few)
    return made


@pytest.mark.parametrize("name", ["pubmed", "arxiv"])
def test_papers_from_the_hub_are_of_one_commit(hub, name):
    expected = [f"{name} test {i} .\nend ." for i in range(3)]
    commit = pin_revision(name)
    assert commit == COMMIT and hub.asked == [
        ("armanc/scientific_papers", "refs/convert/parquet", ".gitattributes")
    ]
    hub.asked.clear()
    assert load_texts(name, split="test", revision=commit) == expected
    assert hub.asked == [("armanc/scientific_papers", COMMIT, f"{name}/test/*.parquet")]  # no other split
    assert load_texts(name, split="test") == expected
    assert pin_revision(name, "main") == COMMIT and hub.asked[-1][1] == "main"
    assert len(load_texts(name, split="all")) == 9
    assert load_texts(name, split="test", text_column="abstract") == ["a"] * 3


def test_papers_are_streamed_from_the_commit(hub):
    stream = load_texts("arxiv", split="train", revision=COMMIT, streaming=True)
    assert next(stream) == "arxiv train 0 .\nend ."
    file = f"datasets/armanc/scientific_papers@{COMMIT}/arxiv/partial-train/0000.parquet"
    assert hub.asked == [file]
    assert load_texts("arxiv", revision=COMMIT, limit=2) == [f"arxiv train {i} .\nend ." for i in range(2)]
    assert hub.asked == [file, file]


@pytest.mark.parametrize("streaming", [False, True])
def test_papers_without_the_hub(hub, monkeypatch, streaming):
    """What was fetched once is read from the cache; what was not is one line that says where to get it."""
    hub.online = False
    assert len(list(load_texts("pubmed", split="test", revision=COMMIT, streaming=streaming))) == 3
    with pytest.raises(
        FileNotFoundError, match=r"Couldn't reach the hub\)\. Get arxiv-dataset\.zip"
    ) as caught:
        load_texts("arxiv", streaming=streaming)
    assert "\n" not in str(caught.value)
    with pytest.raises(
        FileNotFoundError, match=f"no files pubmed/test/.* at commit {OTHER}. Get pubmed-data"
    ):
        load_texts("pubmed", split="test", revision=OTHER)


@pytest.mark.parametrize("streaming", [False, True])
def test_papers_that_are_not_all_there(hub, monkeypatch, streaming):
    monkeypatch.setitem(hub_module.PAPERS_TEXTS["arxiv"], "train", 203_037)
    message = (
        f"copy of arxiv at commit {COMMIT} has 3 texts in its train split instead of 203,037. Get arxiv-"
    )
    with pytest.raises(ValueError, match=message):
        list(load_texts("arxiv", streaming=streaming))
    assert len(load_texts("arxiv", limit=3)) == 3
    assert len(load_texts("arxiv", split="test")) == 3


def test_hub(hub, monkeypatch, papers):
    calls = []

    def load_dataset(path, name=None, **options):
        calls.append((path, name, options))
        return papers

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_texts("owner/name", split="test") == [f"test {i}" for i in range(4)]
    assert load_texts("owner/name:config", revision="abc", limit=2) == ["train 0", "train 1"]
    assert calls == [
        ("owner/name", None, {"revision": COMMIT, "streaming": False}),
        ("owner/name", "config", {"revision": COMMIT, "streaming": True}),
    ]
    names = [("owner/name", None, ".gitattributes"), ("owner/name", "abc", ".gitattributes")]
    assert hub.asked == names


def test_another_commit_in_the_cache_is_not_taken(hub, monkeypatch, papers, tmp_path):
    papers.save_to_disk(str(tmp_path / OTHER))
    cached = datasets.load_from_disk(str(tmp_path / OTHER))["train"]  # its folder bears a commit's name
    monkeypatch.setattr(type(cached), "cache_files", [{"filename": str(tmp_path / OTHER / "a.arrow")}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"train": cached})
    with pytest.raises(FileNotFoundError, match=f"owner/name at commit {COMMIT} .* the cache has {OTHER}"):
        load_texts("owner/name", revision=COMMIT)
    assert len(load_texts("owner/name", revision=OTHER)) == 2


def test_what_is_here_has_no_revision(tmp_path, hub):
    path = write(tmp_path / "a.jsonl", json_lines(TEXTS))
    for source in ("python-docs", str(path)):
        assert pin_revision(source) is None
        with pytest.raises(ValueError, match="is not on the hub: it has no revision 'main'"):
            load_texts(source, revision="main")
    write(tmp_path / "pubmed-dataset" / "train.txt", json_lines(TEXTS, "article_text"))
    assert pin_revision("pubmed") is None and load_texts("pubmed") == TEXTS
    assert pin_revision("pubmed", COMMIT) == COMMIT and hub.asked == []
    with pytest.raises(ValueError, match="is no data set"):
        pin_revision("wikipedia")


def test_hub_data_with_a_single_split(hub, monkeypatch):
    texts = [f"text {i}" for i in range(40)]

    def load_dataset(path, name=None, **options):
        data = datasets.Dataset.from_dict({"line": texts}).to_iterable_dataset()
        return {"train": data.map(lambda row: {"text": row["line"]}, remove_columns=["line"])}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    parts = [load_texts("owner/name", split=split) for split in sources.SPLITS]
    assert [len(part) for part in parts] == [36, 2, 2]
    assert sorted(sum(parts, [])) == sorted(texts)


def test_hub_out_of_reach_is_one_line(hub, monkeypatch):
    hub.online = False
    with pytest.raises(
        FileNotFoundError, match=r"no file or folder a/b is here, .*Couldn't reach the hub\)$"
    ) as caught:
        load_texts("a/b")
    assert "\n" not in str(caught.value)


def test_hub_script_names_the_conversion(hub, monkeypatch):
    def load_dataset(path, name=None, **options):
        raise RuntimeError("Dataset scripts are no longer supported, but found b.py")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(FileNotFoundError, match="revision='refs/convert/parquet'"):
        load_texts("a/b")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("by_variable", [False, True])
def test_pubmed_from_its_archive(tmp_path, monkeypatch, packed, by_variable):
    place = tmp_path / "elsewhere" if by_variable else tmp_path
    if by_variable:
        monkeypatch.setenv(sources.DATA_VARIABLE, str(place))
    for name in ("train", "val", "test"):
        row = {
            "article_id": "x",
            "article_text": [f"{name} .", "2 ."],
            "section_names": ["i"],
            "labels": None,
        }
        content = json.dumps(row) + "\n"
        if packed:
            place.mkdir(exist_ok=True)
            with zipfile.ZipFile(place / "pubmed-dataset.zip", "a") as archive:
                archive.writestr(f"pubmed-dataset/{name}.txt", content)
        else:
            write(place / "pubmed-dataset" / f"{name}.txt", content)
    assert load_texts("pubmed", split="train") == ["train .\n2 ."]
    assert load_texts("pubmed", split="validation") == ["val .\n2 ."]
    assert load_texts("pubmed", split="test") == ["test .\n2 ."]
