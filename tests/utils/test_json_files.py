from __future__ import annotations

import os

import pytest

from gpt2jax.utils.json_files import MAX_DEPTH, parse_json, read_json


def test_read_json_returns_the_object(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": 1, "b": [2], "c": null}')
    assert read_json(path) == read_json(str(path), ("a", "b")) == {"a": 1, "b": [2], "c": None}
    assert read_json(path, {"a": float, "b": list}, {"c": (str, type(None)), "d": dict})["a"] == 1
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is damaged: it is not JSON"),
        (b'{"a": 1', "is damaged: it is not JSON"),
        (b'{"a": "\xff"}', "is damaged: it is not JSON: 'utf-8' codec"),
        (b"[" * 100_000, "is damaged: it is not JSON"),
        (b'{"a": ' * 500 + b"1" + b"}" * 500, "nested more than 100 deep"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "is damaged: it is not JSON"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
            "is a Git LFS pointer: fetch the file",
        ),
        (b"<!DOCTYPE html><html>", "is an HTML page"),
        (b"[1]", "is damaged: it must hold an object, got a list"),
        (b"null", "is damaged: it must hold an object, got null"),
        (b'{"b": {}}', "is damaged: it has no a and no c"),
        (b'{"a": "1", "c": 2}', "a must be a whole number, got '1'"),
        (b'{"a": true, "c": 2}', "a must be a whole number, got True"),
        (b'{"a": 1, "c": 2, "d": 3}', "d must be an object or null, got 3"),
    ],
)
def test_read_json_names_the_file_and_the_fault(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as info:
        read_json(tmp_path / "a.json", {"a": int, "c": object}, {"d": (dict, type(None))})
    assert str(info.value).startswith(str(tmp_path / "a.json")) and "\n" not in str(info.value)


def test_parse_json_takes_values_of_the_greatest_depth_alone():
    for depth, is_legal in ((MAX_DEPTH - 1, True), (MAX_DEPTH, False), (100_000, False)):
        text = "[" * depth + "1" + "]" * depth
        if is_legal:
            assert parse_json(text, "a.json") == parse_json(text.encode(), "a.json")
        else:
            with pytest.raises(ValueError, match=r"a.json, line 3 is not JSON.* nested"):
                parse_json(text, "a.json, line 3")


def test_read_json_of_a_pipe_or_a_folder(tmp_path):
    """Opening the pipe would wait for ever."""
    os.mkfifo(tmp_path / "pipe.json")
    for path in (tmp_path / "pipe.json", tmp_path):
        with pytest.raises(ValueError, match=f"^{path} must be a file, got a folder, a pipe or a device"):
            read_json(path)
