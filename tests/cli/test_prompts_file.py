"""Files of prompts for `gpt2jax generate`: JSON lines and plain lines as programs write them."""

from __future__ import annotations

import io
import json
import os

import pytest

from gpt2jax.cli import main
from gpt2jax.cli.generate import Options, _json_line, _write, read_rows


def prompts_of(options: Options) -> list[str]:
    return [row["prompt"] for row in read_rows(options)]


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("a.jsonl", '{"prompt": "line\u2028sep"}\n', ["line\u2028sep"]),
        ("d.jsonl", '\ufeff{"prompt":"x"}\n', ["x"]),
        ("h.jsonl", '{"prompt":"a"}\n\n{"prompt":"b"}\n', ["a", "b"]),
        ("h.JSONL", '{"prompt":"a"}\r\n  \r\n{"prompt":""}', ["a", ""]),
        ("h.ndjson", '{"prompt":"a\x85b"}', ["a\x85b"]),
        ("p.txt", "\ufefffirst\r\n\nsec\x0cond\u2028\r third \n\n", ["first", "sec\x0cond\u2028", " third "]),
        ("empty.txt", "", []),
        ("a.json", '[{"prompt":"a"},\n {"prompt":"b","n":1}]', ["a", "b"]),
        ("lines.json", '{"prompt":"a"}\n{"prompt":"b"}\n', ["a", "b"]),
        ("out.txt", '\n{"prompt":"a","text":"b"}\n{"prompt":"c"}\n', ["a", "c"]),
        ("code.txt", '{"a": 1}\n[1]\n', ['{"a": 1}', "[1]"]),
    ],
)
def test_read_rows(tmp_path, name, content, prompts):
    (tmp_path / name).write_bytes(content.encode())
    assert prompts_of(Options(file=tmp_path / name)) == prompts


def test_read_rows_as_generate_writes_them(tmp_path):
    prompts = ["a\u2028b\u2029c\x85d\x0b", "\ud800 half", '"quoted"\n', ""]
    (tmp_path / "out.jsonl").write_text(
        "".join(_json_line({"prompt": prompt}) for prompt in prompts), "utf-8"
    )
    assert prompts_of(Options(prompts=("first",), file=tmp_path / "out.jsonl")) == ["first", *prompts]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt":{}}', r'p.jsonl, line 2: the field "prompt" must be a text, got {}'),
        (b'{"prompt":null}', r'p.jsonl, line 2: the field "prompt" must be a text, got None'),
        (b'{"text":"a"}', r'p.jsonl, line 2: expected JSON with a field "prompt"'),
        (b'{"prompt":', r'p.jsonl, line 2: expected JSON with a field "prompt"'),
        (b'["prompt"]', r'p.jsonl, line 2: expected JSON with a field "prompt"'),
        (b'{"prompt":"\xe9"}', r"p.jsonl, line 2: the file must be UTF-8"),
    ],
)
def test_read_rows_names_file_and_line(tmp_path, line, message):
    (tmp_path / "p.jsonl").write_bytes(json.dumps({"prompt": "a"}).encode() + b"\n" + line)
    with pytest.raises(ValueError, match=message):
        prompts_of(Options(file=tmp_path / "p.jsonl"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", "prompt,n\na,1\n", r"p.csv: a file of prompts must have one prompt a line, .*got \.csv"),
        ("p.json", '[{"prompt":"a"},{"text":"b"}]', r'p.json, entry 2: expected JSON with a field "prompt"'),
        ("p.json", '[{"prompt":"a"},', r"p.json is not JSON"),
    ],
)
def test_read_prompts_refuses_other_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        prompts_of(Options(file=tmp_path / name))


def test_read_rows_refuses_a_folder_or_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for file in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(
            ValueError, match=f"--file {file} must be a file, got a folder, a pipe or a device"
        ):
            read_rows(Options(file=file))
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_rows(Options(file=tmp_path / "none"))


def test_generated_lines_are_json_without_nan():
    line = _json_line({"prompt": "a", "logprobs": [float("nan"), -1.5, float("-inf")]})
    assert json.loads(line, parse_constant=pytest.fail) == {"prompt": "a", "logprobs": [None, -1.5, None]}


def test_generate_of_a_bad_prompts_file_is_one_line(tmp_path, capsys):
    path = tmp_path / "i.jsonl"
    path.write_text('{"prompt":{}}\n')
    with pytest.raises(SystemExit) as ended:
        main(["generate", "--file", str(path)])
    assert ended.value.code == 2
    message = 'line 1: the field "prompt" must be a text, got {}'
    assert capsys.readouterr().err == f"gpt2jax generate: error: {path}, {message}\n"


def test_write_shows_the_path_without_control_characters(tmp_path, capsys):
    _write(list, tmp_path / "a\x1b[31m\u202e.jsonl", [])
    assert capsys.readouterr().err.endswith("a\\x1b[31m\\u202e.jsonl\n")


@pytest.mark.slow
def test_generate_splits_standard_input_at_line_ends_alone(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("\ufeffa\u2028b\x85\n\nc"))
    main(["generate", "--max-new-tokens", "1", "--out", "-"])
    lines = capsys.readouterr().out.rstrip("\n").split("\n")
    assert [json.loads(line)["prompt"] for line in lines] == ["a\u2028b\x85", "", "c"]


def test_read_rows_nested_too_deeply(tmp_path):
    (tmp_path / "p.jsonl").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="p.jsonl is not JSON that can be read: it is nested too deeply"):
        prompts_of(Options(file=tmp_path / "p.jsonl"))


def test_read_rows_keeps_the_other_fields(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"id": 7, "prompt": "a"}\n')
    rows = read_rows(Options(prompts=("first",), file=tmp_path / "p.jsonl"))
    assert rows == [{"prompt": "first"}, {"id": 7, "prompt": "a"}]


@pytest.mark.slow
def test_generate_keeps_fields_and_separates_prompts(tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text(
        '{"id": 7, "prompt": "Return", "text": "old"}\n{"id": 8, "prompt": "the"}\n'
    )
    arguments = ["generate", "--file", str(tmp_path / "p.jsonl"), "--max-new-tokens", "8"]
    main([*arguments, "--out", str(tmp_path / "out.jsonl")])
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(row["id"], row["prompt"]) for row in rows] == [(7, "Return"), (8, "the")]
    capsys.readouterr()
    main(arguments)
    shown = capsys.readouterr()
    expected = [f"--- prompt {i + 1} of 2 ---\n{row['prompt']}{row['text']}\n" for i, row in enumerate(rows)]
    assert shown.out == "\n".join(expected) and shown.err.count(" tokens in ") == 2
