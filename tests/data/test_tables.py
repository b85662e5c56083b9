"""Tables, JSON and files of texts in unusual forms; test_cases.py has those that users stumbled over."""

from __future__ import annotations

import gzip
import json
import os
import struct
import warnings
import zipfile

import pyarrow
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet
import pytest
from sample_files import TEXTS, json_lines, parquet, write

from gpt2jax.data.encodings import likely_encoding, wide_encoding
from gpt2jax.data.sources import load_texts
from gpt2jax.utils.notices import Notice

pytestmark = pytest.mark.usefixtures("empty_folder")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("sep_quoted.csv", '"sep=|"\r\ntext|n\r\na;b|1\r\n', ["a;b"]),
        ("tabs.csv", "text\tid\na, b\t1\n", ["a, b"]),
        ("commas.tsv", "text,id\na,1\n", ["a"]),
        ("header_of_quoted_delimiters.csv", 'text,"a;b;c;d"\nx,1\n', ["x"]),
        ("spaces.csv", 'id, text\n1, "hello, world"\n', ["hello, world"]),
        ("backslash.csv", 'text,n\n"he said \\"a, b\\"",1\n', ['he said "a, b"']),
        ("single.csv", "text,n\n'hello, world',1\n", ["hello, world"]),
        ("bare_quotes.tsv", 'text\tn\n"hello" she said\t1\n', ['"hello" she said']),
        ("pandas_index.csv", ",text\n0,a\n1,b\n", ["a", "b"]),
        ("two_lines.csv", 'text,n\n"a\r\nb",1\n', ["a\r\nb"]),
        ("blank_lines.csv", "text,n\na,1\n\n  \nb,2\n", ["a", "b"]),
        ("empty_cells.csv", "text,n\n,1\nb,\n", ["", "b"]),
        ("bom.csv", "\ufefftext,n\na,1\n", ["a"]),
        ("index.json", '{"0":{"text":"a","id":1},"1":{"text":"b","id":2}}', ["a", "b"]),
        ("index_of_digits.json", '{"0":{"words":"a"},"1":{"words":"b"}}', ["a", "b"]),
        ("split.json", '{"columns":["id","text"],"index":[0,1],"data":[[1,"a"],[2,null]]}', ["a", ""]),
        ("null_row.json", '[null,{"text":"a"},null]', ["", "a", ""]),
        ("null_row.jsonl", '{"text":"a"}\nnull\n{"text":"b"}\n', ["a", "", "b"]),
        ("null_string.json", '["a",null]', ["a", ""]),
        ("nested.jsonl", '{"id":1,"data":{"body_text":"a"}}\n', ["a"]),
        ("utf8_bom.json", '\ufeff[{"text":"a"}]', ["a"]),
        ("other_mark.csv", "id^text\n1^a, b\n2^c\n", ["a, b", "c"]),
        ("names_with_marks.csv", "re-action\na-b\nc\n", ["a-b", "c"]),
        ("separator.jsonl", '{"text":"a\u2028b"}\n', ["a\u2028b"]),
    ],
)
def test_load_texts_reads_odd_tables(tmp_path, name, content, expected):
    assert load_texts(write(tmp_path / name, content), "all") == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "long.csv",
            "id,text\n1,a\n2,b,c\n",
            "long.csv, line 3: expected 2 cells as in the header, got 3; quote",
        ),
        ("alone.csv", "text\nhello, world\n", "line 2: expected 1 cells as in the header, got 2"),
        (
            "open.csv",
            'text,id\n"a\nb",1\n"c",2\nd,"3\n',
            "line 5: unexpected end of data: a quote opens here",
        ),
        ("open.tsv", 'text\tid\na\t1\n"b\t2\n', "line 3: unexpected end of data: a quote opens here"),
        ("late.csv", "text,id\n" + "a,1\n" * 500 + 'b,"2\n', "line 502: unexpected end of data"),
        ("twice.csv", "text,text\na,b\n", "line 1: the header has two columns 'text'"),
        ("other_mark.csv", "id:text\n1:a: b\n", "line 2: expected 2 cells as in the header, got 3"),
        (
            "split.json",
            '{"columns":["text","n"],"data":[["a",1],["b"]]}',
            "entry 2: expected a list of 2 cells",
        ),
        (
            "split_of_numbers.json",
            '{"columns":5,"data":7}',
            "columns must be a list of names and data a list of",
        ),
        (
            "other.jsonl",
            '{"text":"a"}\n{"content":"b"}\n',
            "line 2: the row has no column 'text' .* but 'content'",
        ),
        ("other_late.jsonl", '{"sum":"a"}\n' * 100 + '{"text":"b"}', "line 101: the row has no column 'sum'"),
        ("deep.json", "[" * 100_000, "deep.json is not JSON"),
        ("unclear.json", '{"a":{"x":"1"},"b":{"x":"2"}}', "not clear which names are those of columns"),
        ("page.csv", "<!DOCTYPE html>\n<html>", "is an HTML page"),
        ("plain.jsonl.gz", "no gzip", "plain.jsonl.gz is damaged: it is not compressed"),
    ],
)
def test_load_texts_refuses_odd_tables_by_line(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_texts(write(tmp_path / name, content), "all")
    assert "\n" not in str(caught.value)


def test_records_field_names_the_rows(tmp_path):
    path = write(
        tmp_path / "a.json", '{"version":"1.0","data":[{"text":"a"},{"text":"b"}],"in":{"ner":["c"]}}'
    )
    assert load_texts(path, "all", records_field="data") == ["a", "b"]
    assert load_texts(path, "all", records_field="in.ner") == ["c"]
    with pytest.raises(ValueError, match="there is no field 'dat'; did you mean 'data'"):
        load_texts(path, "all", records_field="dat")
    lines = write(tmp_path / "b.jsonl", json_lines(TEXTS))
    with pytest.raises(ValueError, match="b.jsonl has one row a line, .*; leave records_field out"):
        load_texts(lines, "all", records_field="data")


def test_a_named_column_is_found_wherever_it_stands(tmp_path):
    rows = [{"id": i} for i in range(300)] + [{"id": 300, "words": "a"}]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert load_texts(path, "all", text_column="words") == [""] * 300 + ["a"]
    pairs = load_texts(path, "all", prompt_column="words", completion_column="words")
    assert pairs[::300] == [{"prompt": "", "completion": ""}, {"prompt": "a", "completion": "a"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id;text\n1;a\n", ": cells are separated by ';' and quoted by \"$"),
        (
            "first words\nmore words\n",
            ", line 1: taken for the header, so that the texts begin after 'first words'$",
        ),
    ],
)
def test_dialect_and_header_are_shown(tmp_path, content, message):
    with pytest.warns(Notice, match="a.csv" + message):
        load_texts(write(tmp_path / "a.csv", content), "all")


STRINGS = pyarrow.array(["a", None, "ä"])


@pytest.mark.parametrize("kind", ["parquet", "feather", "arrow", "stream"])
@pytest.mark.parametrize(
    ("column", "array", "expected"),
    [
        ("text", STRINGS.dictionary_encode(), ["a", "", "ä"]),
        ("text", STRINGS.cast(pyarrow.large_string()), ["a", "", "ä"]),
        ("text", STRINGS.cast(pyarrow.binary()), ["a", "", "ä"]),
        (
            "text",
            pyarrow.array([["a", None], None, []], pyarrow.large_list(pyarrow.string())),
            ["a\n", "", ""],
        ),
        ("text", pyarrow.nulls(2), ["", ""]),
        ("meta", pyarrow.array([{"text": "a", "n": 1}, None]), ["a", ""]),
    ],
    ids=["dictionary", "large", "binary", "large-list", "null", "struct"],
)
def test_arrow_columns(tmp_path, kind, column, array, expected):
    table = pyarrow.table({"id": list(range(len(array))), column: array})
    path = tmp_path / f"a.{'arrow' if kind == 'stream' else kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    elif kind == "stream":
        with pyarrow.ipc.new_stream(str(path), table.schema) as stream:
            stream.write_table(table)
    else:
        pyarrow.feather.write_feather(table, path)
    assert load_texts(path, "all") == expected
    if column == "meta":
        assert load_texts(path, "all", text_column="meta.text") == expected


def test_columns_of_one_name_are_refused(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet has two columns 'text'; rename one of them"):
        load_texts(tmp_path / "a.parquet", "all")


def test_bytes_that_are_not_text_are_named(tmp_path):
    path = parquet(tmp_path / "a.parquet", text=[b"\xff\xfe"])
    with pytest.raises(ValueError, match="row 1: column 'text' holds bytes that are not UTF-8"):
        load_texts(path, "all")
    path = parquet(tmp_path / "b.parquet", image=[b"\xff"], caption=["a cat"])
    assert load_texts(path, "all") == ["a cat"]


# Files


def test_plain_text_has_many_extensions(tmp_path):
    for name in ("a.md", "b.text", "c.tex", "d.html", "e.py", "f.rst", "g.MARKDOWN", "wiki.tokens"):
        assert load_texts(write(tmp_path / name, f"<p>{name}"), "all") == [f"<p>{name}"]


def test_compression_is_told_by_the_content(tmp_path):
    content = json_lines(TEXTS).encode()
    assert load_texts(write(tmp_path / "a.jsonl", gzip.compress(content)), "all") == TEXTS
    assert load_texts(write(tmp_path / "b.jsonl.gz", content), "all") == TEXTS
    assert load_texts(write(tmp_path / "c.txt", "BZh is a beginning"), "all") == ["BZh is a beginning"]
    with zipfile.ZipFile(tmp_path / "d.csv", "w") as archive:
        archive.writestr("d.csv", "text,n\na,1\n")
    assert load_texts(tmp_path / "d.csv", "all") == ["a"]


def test_several_paths_and_patterns(tmp_path):
    for name in ("a", "b", "c"):
        write(tmp_path / "in" / name / f"{name}.jsonl", json_lines([name]))
    write(tmp_path / "in" / "d.md", "d")
    assert load_texts("in/**/*.jsonl", "all") == ["a", "b", "c"]
    assert load_texts(str(tmp_path / "in" / "[ab]" / "*"), "all") == ["a", "b"]
    assert load_texts(["in/c", tmp_path / "in" / "a" / "a.jsonl"], "all") == ["c", "a"]
    for name in ("train/a.txt", "test/b.txt"):
        write(tmp_path / "splits" / name, name)
    for pattern in ("splits/*/*.txt", "./spl*/*", "splits/t?st/*", str(tmp_path / "splits" / "**" / "*.txt")):
        assert load_texts(pattern, "test") == ["test/b.txt"]
    assert load_texts("splits/test/*.txt", "all") == ["test/b.txt"]
    with pytest.raises(FileNotFoundError, match=r"no file that fits the pattern in/\*.csv"):
        load_texts("in/*.csv", "all")
    with pytest.raises(ValueError, match="source must be a name or a path, or a list of at least one, got "):
        load_texts([], "all")
    with pytest.raises(FileNotFoundError, match="there is no file or folder in/e.txt"):
        load_texts(["in/e.txt"], "all")


def test_files_passed_over_are_named(tmp_path):
    write(tmp_path / "c" / "a.jsonl", json_lines(["a"]))
    for name in ("metadata.json", "notes.docx", "LICENSE", ".DS_Store", "README.md", "x\x1b[31m.bin"):
        write(tmp_path / "c" / name, "{}")
    with pytest.warns(Notice) as given:
        assert load_texts(tmp_path / "c", "all") == ["a"]
    (message,) = [str(one.message) for one in given]
    assert (
        "passed over 5 files without texts by name: LICENSE, README.md, metadata.json, notes.docx" in message
    )
    assert "\x1b" not in message and ".DS_Store" not in message


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            ("a.jsonl", '{"text":"a"}'),
            ("info.json", '{"name":"mine"}'),
            r"info.json .*column 'name'.*column 'text'",
        ),
        (
            ("a.json", '{"name":"mine"}'),
            ("b.jsonl", '{"text":"a"}'),
            r"b.jsonl .*column 'text'.*column 'name'",
        ),
        (("a.txt", "a"), ("info.json", '{"name":"mine"}'), r"info.json .*column 'name'.*plain text"),
    ],
)
def test_a_file_of_another_shape_is_refused(tmp_path, first, second, message):
    for name, content in (first, second):
        write(tmp_path / "c" / name, content)
    with pytest.raises(ValueError, match=message):
        load_texts(tmp_path / "c", "all")


# Encodings


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("café “x”", "cp1252"),
        ("Straße über Ähre", "cp1252"),
        ("Un café déjà préparé", "mac-roman"),
        ("Un café déjà préparé", "cp850"),
        ("Zażółć gęślą jaźń wyszło", "cp1250"),
        ("Zażółć gęślą jaźń wyszło", "iso8859-2"),
        ("Привет, как дела?", "cp1251"),
        ("Привет, как дела?", "koi8-r"),
        ("Привет, как дела?", "cp866"),
        ("Привет, как дела?", "iso8859-5"),
        ("Καλημέρα κόσμε, τι κάνεις", "cp1253"),
        ("bugün güneş çok parlıyor", "cp1254"),
        ("שלום עולם מה שלומך", "cp1255"),
        ("مرحبا بالعالم كيف حالك", "cp1256"),
        ("こんにちは、元気ですか", "shift_jis"),
        ("こんにちは、元気ですか", "euc-jp"),
        ("你好,世界。这是一个测试", "gb18030"),
        ("안녕하세요 세계", "euc-kr"),
        ("hello", "utf-16-le"),
        ("hello", "utf-16-be"),
        ("日本語の文章です。\nカタカナも。\n", "utf-16-le"),
        ("hello", "utf-32-le"),
        ("L’été – “voilà” où c’est", "utf-32-le"),
        ("text", "utf-16"),
    ],
)
def test_the_likely_encoding_is_named_and_reads(tmp_path, text, encoding):
    path = write(tmp_path / "a.txt", text.encode(encoding))
    assert (wide_encoding(path.read_bytes()) or likely_encoding(path.read_bytes())) == encoding
    with pytest.raises(ValueError, match=f"encoding='{encoding}' .--encoding {encoding}"):
        load_texts(path, "all")
    assert load_texts(path, "all", encoding=encoding) == [text]


@pytest.mark.parametrize(
    ("text", "encoding", "name"),
    [
        ("日本語の文章です。", "iso2022_jp", "iso2022_jp"),
        ("hello\n日本語", "iso2022_jp", "iso2022_jp"),
        ("안녕하세요", "iso2022_kr", "iso2022_kr"),
        ("这是中文文本，今天天气很好。", "utf-16-le", "UTF-16-LE"),
        ("これは日本語の文章です。", "utf-16-be", "UTF-16-BE"),
    ],
)
def test_an_encoding_without_zero_bytes_is_named(tmp_path, text, encoding, name):
    path = write(tmp_path / "a.txt", text.encode(encoding))
    with pytest.raises(ValueError, match=f"is probably {name}: .*--encoding {encoding}"):
        load_texts(path, "all")
    assert load_texts(path, "all", encoding=encoding) == [text]


def test_colors_of_terminals_are_text(tmp_path):
    path = write(tmp_path / "a.txt", "\x1b[31mred\x1b(B\x1b[m")
    assert load_texts(path, "all") == ["\x1b[31mred\x1b(B\x1b[m"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"%PDF-1.4\n1 0 obj\n", "a PDF document"),
        (b"{\\rtf1\\ansi hi}", "a document in Rich Text Format"),
        (b"a.txt".ljust(257, b"\0") + b"ustar\x0000" + bytes(248) + b"text\n", "a tar archive: unpack it"),
        (b"\x04\x22\x4d\x18\x64\x40\xa7\x06", "compressed by lz4: unpack it"),
        (b"7z\xbc\xaf\x27\x1c\x00\x04", "a 7z archive: unpack it"),
        (b"Rar!\x1a\x07\x01\x00", "a RAR archive: unpack it"),
        (
            b"hello\n" + bytes(500) + b"hello\n",
            "holds binary data, not text: many of its first bytes are zero",
        ),
    ],
    ids=["pdf", "rtf", "tar", "lz4", "7z", "rar", "zeros"],
)
def test_documents_that_are_not_text_are_named(tmp_path, content, message):
    for name, packed in (("a.txt", content), ("b.txt.gz", gzip.compress(content))):
        with pytest.raises(ValueError, match=message):
            load_texts(write(tmp_path / name, packed), "all")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_pipes_and_devices_are_named(tmp_path, name):
    """Opening the pipe would wait for ever, and reading the device would never end."""
    os.mkfifo(tmp_path / name)
    for source in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match=rf"{name} must be a file, got a pipe or a device"):
            load_texts(source, "all")
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=rf"{name} must be a file, got a pipe or a device"):
        load_texts(tmp_path / name, "all")


def test_an_encoding_that_garbles_utf8_is_named(tmp_path):
    path = write(tmp_path / "a.txt", "café")
    with pytest.warns(Notice, match="a.txt is read as cp1252, though its first bytes are UTF-8"):
        assert load_texts(path, "all", encoding="cp1252") == ["cafÃ©"]


def test_a_wrong_encoding_is_named(tmp_path):
    path = write(tmp_path / "a.csv", "text,n\ncafé,1\n")
    with pytest.raises(ValueError, match=r"a.csv is not ascii after line 0; UnicodeDecodeError"):
        load_texts(path, "all", encoding="ascii")
    with pytest.raises(
        ValueError, match="encoding must be the name of an encoding such as utf-8, .*got 'utf-9'"
    ):
        load_texts(path, "all", encoding="utf-9")


def test_arrow_file_with_damaged_offsets(tmp_path):
    table, file = pyarrow.table({"text": ["abc", "de"]}), tmp_path / "a.arrow"
    with pyarrow.ipc.new_stream(str(file), table.schema) as sink:
        sink.write_table(table)
    offsets, damaged = struct.pack("<3i", 0, 3, 5), struct.pack("<3i", 0, -5, 1 << 30)
    assert file.read_bytes().count(offsets) == 1
    file.write_bytes(file.read_bytes().replace(offsets, damaged))
    # without a check, reading it ends the process
    with pytest.raises(ValueError, match=r"a\.arrow is damaged"):
        load_texts(str(file), "all")


@pytest.mark.parametrize(
    ("name", "damaged", "message"),
    [
        # the column is required instead of optional: pyarrow ended the process when it was asked for the column
        (b"%\x02\x18\x04text", b"%\x00\x18\x04text", "damaged"),
        (
            b"\x18\x04text",
            b"\x18\x04t\xffxt",
            "not a whole Parquet file: 'utf-8' codec can't decode byte 0xff",
        ),
    ],
    ids=["repetition", "name"],
)
def test_parquet_file_with_a_damaged_schema(tmp_path, name, damaged, message):
    file = parquet(tmp_path / "a.parquet", text=["abc", "de"])
    before, schema, after = file.read_bytes().partition(b"\x18\x06schema")
    assert name in after
    file.write_bytes(before + schema + after.replace(name, damaged, 1))
    with pytest.raises(ValueError, match=rf"a\.parquet is {message}"):
        load_texts(str(file), "all")


def test_zip_archive_with_a_damaged_list(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w"):
        pass
    with pytest.raises(
        ValueError, match=r"a.zip is not a zip archive: its list of files is damaged or empty"
    ):
        load_texts(str(tmp_path / "a.zip"), "all")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("a.txt", "b")
    file = tmp_path / "b.zip"
    file.write_bytes(file.read_bytes().replace(b"a.txt", b"\0.txt"))
    # Python 3.13 lists a name that begins with NUL as an empty one
    with pytest.raises(ValueError, match=r"b.zip (is not a zip archive|holds no file of a known format)"):
        load_texts(str(file), "all")


@pytest.mark.parametrize("name", ["text", ""])
def test_arrow_items_names_a_file_with_two_columns_of_one_name(tmp_path, name):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=[name, name])
    with pyarrow.ipc.new_file(tmp_path / "a.arrow", table.schema) as file:
        file.write_table(table)
    with pytest.raises(ValueError, match=f"a\\.arrow has two columns '{name}'; rename one of them"):
        list(load_texts(tmp_path / "a.arrow", "all"))


def test_column_that_is_taken_among_several_is_told(tmp_path):
    path = write(tmp_path / "two.csv", "title,body\na,b\n")
    with pytest.warns(Notice, match="those of column 'body', not title; text_column .--text-column. takes"):
        assert load_texts(path, "all") == ["b"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        assert load_texts(path, "all", text_column="title") == ["a"]
