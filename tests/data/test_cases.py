"""Inputs that went wrong for users of similar software, each with what is right."""

from __future__ import annotations

import io
import re
import zipfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from sample_files import write

from gpt2jax.data.sources import load_texts
from gpt2jax.utils.notices import Notice

pytestmark = pytest.mark.usefixtures("empty_folder")

FOX = "".join(f"The quick brown fox jumps over the lazy dog number {i}.\n" for i in range(40))


def parquet_of_20_gb() -> bytes:
    """Return a small file whose only dictionary entry of 10 MB is the text of each of 2000 rows."""
    table = pyarrow.table({"text": pyarrow.DictionaryArray.from_arrays([0] * 2000, ["x" * 10_000_000])})
    stream = io.BytesIO()
    pyarrow.parquet.write_table(table, stream, compression="zstd")
    return stream.getvalue()


def encrypted_zip() -> bytes:
    """Return an archive whose only entry says that it needs a password."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a.txt", "secret")
    content = bytearray(stream.getvalue())
    content[6] |= 1
    content[content.index(b"PK\x01\x02") + 8] |= 1
    return bytes(content)


# name -> (files, options, texts)
READ: dict[str, tuple[dict[str, str | bytes], dict[str, Any], list[str]]] = {
    "semicolon": ({"a.csv": "id;text\n1;hello there\n2;how are you\n"}, {}, ["hello there", "how are you"]),
    "excel_sep": ({"a.csv": "sep=;\nid;text\n1;hello there\n"}, {}, ["hello there"]),
    "blank_first": ({"a.csv": "\ntext,id\na,1\n"}, {}, ["a"]),
    "mac": ({"a.csv": "text,id\ra,1\r"}, {}, ["a"]),
    "wrapped": ({"a.json": '{"v":"1","data":[{"text":"a"}]}'}, {"records_field": "data"}, ["a"]),
    "wrapped_columns": ({"a.json": '{"data":{"text":["a","b"]}}'}, {"records_field": "data"}, ["a", "b"]),
    "wrapped_twice": ({"a.json": '{"r":{"x":[{"text":"a"}]}}'}, {"records_field": "r.x"}, ["a"]),
    "pandas": ({"a.json": '{"text":{"0":"a","1":"b"},"id":{"0":1,"1":2}}'}, {}, ["a", "b"]),
    "columns_null": ({"a.json": '{"text":["a",null]}'}, {}, ["a", ""]),
    "array": ({"a.jsonl": '[{"text":"a"},{"text":"b"}]'}, {}, ["a", "b"]),
    "first_row_without": ({"a.jsonl": '{"id":1}\n{"id":2,"text":"b"}\n'}, {}, ["", "b"]),
    "cp1252": ({"a.txt": "café “x”\n".encode("cp1252")}, {"encoding": "cp1252"}, ["café “x”\n"]),
    "utf16": ({"a.txt": "hello".encode("utf-16-le")}, {"encoding": "utf-16-le"}, ["hello"]),
    "with_meta": ({"a.jsonl": '{"text":"a"}\n', "metadata.json": '{"name":"mine","n":1}'}, {}, ["a"]),
    "notes": ({"a.txt": "x", "b.md": "# y", "c.md": "# z"}, {}, ["x", "# y", "# z"]),
    "chapters": ({"chapter 1.txt": "a", "chapter 2.txt": "b", "the final test.txt": "c"}, {}, ["a", "b", "c"]),
    "state_of_another_program": ({"state.json": "{}", "a.txt": "x"}, {}, ["x"]),
}  # fmt: skip
# name -> (files, message)
REFUSED: dict[str, tuple[dict[str, str | bytes], str]] = {
    "ragged": ({"a.csv": "id,text\n1,hello, world\n2,b\n"}, "a.csv, line 2: expected 2 cells .*, got 3"),
    "unclosed_quote": ({"a.csv": 'text,id\na,1\n"open,2\nb,3\n'}, "a.csv, line 3: .*a quote opens here"),
    "wrapped": ({"a.json": '{"version":"1.0","data":[{"text":"a"}]}'}, "rows are in 'data'.*--records-field data"),
    "wrapped_columns": ({"a.json": '{"data":{"text":["a","b"]}}'}, "rows are in 'data'.*--records-field data"),
    "wrapped_twice": ({"a.json": '{"r":{"x":[{"text":"a"}]}}'}, r"rows are in 'r\.x'.*--records-field r\.x"),
    "splits_as_fields": ({"a.json": '{"train":[{"text":"a"}],"test":[{"text":"b"}]}'}, "in 'train' or 'test', name"),
    "lists": ({"a.jsonl": '["a",1]\n["b",2]\n'}, "line 1: a text or an object is expected, not list"),
    "no_columns": ({"a.jsonl": "{}\n{}\n"}, "line 1 has no columns"),
    "cp1252": ({"a.txt": "café “x”\n".encode("cp1252")}, "probably cp1252: .*--encoding cp1252"),
    "utf16": ({"a.txt": "hello".encode("utf-16-le")}, "UTF-16-LE by its zero bytes.*--encoding utf-16-le"),
    "picture": ({"a.txt": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" * 9}, "a.txt holds binary data, not text"),
    "lfs": ({"a.jsonl": "version https://git-lfs.github.com/spec/v1\noid x\n"}, "is a Git LFS pointer: fetch the file"),
    "escapes": ({"a.jsonl": '{"\\u001b[31mcol":"x","\\u001b]0;t\\u0007b":"y"}'}, r"its columns: '\\x1b\[31mcol', "),
    "bomb": ({"a.parquet": parquet_of_20_gb()}, r"a.parquet unpacks to .* bytes or more, from \d{3};"),
    "encrypted": ({"a.zip": encrypted_zip()}, "a.zip:a.txt can't be unpacked: .*password required"),
}  # fmt: skip


def source_of(folder: Path, files: dict[str, str | bytes]) -> Path:
    paths = [write(folder / "in" / name, content) for name, content in files.items()]
    return folder / "in" if len(paths) > 1 else paths[0]


@pytest.mark.parametrize("case", READ)
def test_load_texts_reads_cases(tmp_path, case):
    files, options, expected = READ[case]
    assert load_texts(source_of(tmp_path, files), "all", **options) == expected


@pytest.mark.parametrize("case", REFUSED)
def test_load_texts_refuses_cases(tmp_path, case):
    files, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as caught:
        load_texts(source_of(tmp_path, files), "all")
    assert re.fullmatch(
        r"[^\x00-\x1f\x7f]+", str(caught.value)
    )  # one line, and nothing that steers a terminal


@pytest.mark.parametrize(
    ("files", "lines", "message"),
    [
        ({"train.txt": FOX}, 37, "train.txt has no validation and no test split"),
        ({"train.txt": FOX, "test.txt": FOX[-100:]}, 39, "in has no validation split"),
    ],
    ids=["train", "train_and_test"],
)
def test_load_texts_trains_on_what_is_there(tmp_path, files, lines, message):
    source = source_of(tmp_path, files)
    with pytest.warns(Notice, match=message + ": its training texts are split by content, 5% for"):
        train, validation, test = (load_texts(source, split)[0] for split in ("train", "validation", "test"))
    assert train + validation + (test if len(files) == 1 else "") == FOX
    assert train.count("\n") == lines and validation and test
