from __future__ import annotations

import bz2
import gzip
import json
import lzma
import tracemalloc
import zipfile

import pyarrow
import pyarrow.feather
import pytest
from sample_files import TEXTS, json_lines, parquet, write

from gpt2jax.data.sources import Texts, load_texts

pytestmark = pytest.mark.usefixtures("empty_folder")

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
    book = "\ufeffChapter 1\r\n\r\nOnce upon\r\na time.\r\n<|endoftext|>\r\nChapter 2\r\n \r\n\r\nThe end."
    path = write(tmp_path / "book.txt", book)
    assert load_texts(path, split="all") == ["Chapter 1\n\nOnce upon\na time.\n", "Chapter 2\n \n\nThe end."]
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
    path = write(tmp_path / "c.jsonl", "[1]\n")
    with pytest.raises(ValueError, match="c.jsonl, entry 1: a text or an object is expected, not int"):
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
        ("a.parquet", "no parquet at all", "a.parquet is not a whole Parquet file"),
        ("a.zip", "no zip", "a.zip is not a zip archive"),
        ("a.jsonl.gz", "no gzip", "a.jsonl.gz is damaged"),
        ("a.jsonl.bz2", "no bzip", "a.jsonl.bz2 is damaged"),
        ("a.jsonl.xz", "no xz", "a.jsonl.xz is damaged"),
        ("a.jsonl.zst", "no zst", "a.jsonl.zst is damaged"),
        ("a.txt.gz", gzip.compress(b"many words " * 999, mtime=0)[:50], "a.txt.gz is damaged"),
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


# What the parsers of `datasets` would change without an error


def test_json_strings_stay_what_they_are(tmp_path):
    texts = ["2020-01-01", "2021-12-31T00:00:00", "007", "NA", "null", "1.0"]
    assert load_texts(write(tmp_path / "a.jsonl", json_lines(texts)), "all") == texts
    rows = "".join(f"{i},{text}\n" for i, text in enumerate(texts))
    assert load_texts(write(tmp_path / "a.csv", "id,text\n" + rows), "all") == texts


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("semicolon.csv", "id;text\n1;hello there\n2;how are you\n", ["hello there", "how are you"]),
        ("blank_first.csv", "\ntext,id\na,1\n", ["a"]),
        ("array.jsonl", '[{"text":"a"},{"text":"b"}]', ["a", "b"]),
        ("columns_null.json", '{"text":["a",null]}', ["a", ""]),
        ("first_row_without.jsonl", '{"id":1}\n{"id":2,"text":"b"}\n', ["", "b"]),
        ("last_row_without.jsonl", '{"text":"a"}\n{"id":2}\n', ["a", ""]),
        ("list_with_null.jsonl", '{"text":["a",null,"b"]}\n', ["a\n\nb"]),
        ("strings.json", '"a"\n"b"\n', ["a", "b"]),
    ],
)
def test_odd_rows_are_read(tmp_path, name, content, expected):
    assert load_texts(write(tmp_path / name, content), "all") == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            "id,text\n1,hello, world and more\n2,b\n",
            "a.csv, line 2: expected 2 cells as in the header, got 3",
        ),
        (
            "b.csv",
            'id,text\n1,"two\nlines"\n2\n',
            "b.csv, line 4: expected 2 cells as in the header, got 1",
        ),
        ("c.csv", 'text,id\na,1\n"unclosed,2\nb,3\n', "c.csv, line 3: unexpected end of data"),
        ("d.json", '{"version":"1.0","data":[{"text":"a"}]}', "one object with the keys version, data"),
        ("e.json", '{"text":["a","b"],"id":[1]}', "columns of different lengths"),
        ("f.jsonl", '{"\\u001b[31mcol":"x","b":"y"}', r"its columns: '\\x1b\[31mcol', b"),
    ],
)
def test_odd_rows_are_refused_with_their_line(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        load_texts(write(tmp_path / name, content), "all")


@pytest.mark.parametrize("name", ["a.arrow", "a.feather", "a[1].feather"])
def test_arrow_files(tmp_path, name):
    table = pyarrow.table({"id": list(range(5)), "text": pyarrow.array(TEXTS).dictionary_encode()})
    pyarrow.feather.write_feather(table, tmp_path / name)
    assert load_texts(tmp_path / name, "all") == TEXTS
    with pytest.raises(ValueError, match="b.arrow is not a whole Arrow file"):
        load_texts(write(tmp_path / "b.arrow", "no Arrow at all"), "all")


def test_tables_damaged_inside_are_named(tmp_path):
    path = parquet(tmp_path / "a.parquet", text=[f"text {i}" for i in range(1000)])
    content = bytearray(path.read_bytes())
    content[100:1500] = bytes(1400)
    with pytest.raises(ValueError, match="a.parquet is damaged") as caught:
        load_texts(write(path, bytes(content)), "all")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a::b.jsonl", "a[1]*.jsonl", "http:a #%20.jsonl"])
def test_odd_file_names(tmp_path, name):
    folder = tmp_path / "in [x]::y"
    path = write(folder / name, json_lines(TEXTS))
    assert load_texts(path, "all") == load_texts(folder, "all") == TEXTS
    parquet(path.with_suffix(".parquet"), text=TEXTS)
    assert load_texts(folder, "all") == 2 * TEXTS
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.write(path, "in/" + name)
    assert load_texts(tmp_path / "z.zip", "all") == TEXTS


@pytest.mark.slow
def test_files_are_streamed(tmp_path):
    """20 MB of texts are read with less than 6 MB at once."""
    path = write(tmp_path / "a.jsonl", json_lines([f"{i} " + "x" * 10_000 for i in range(2000)]))
    tracemalloc.start()
    assert sum(map(len, Texts(path, "train[:90%]"))) > 15e6
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6e6  # a split by content begins with 400 texts
