"""Prompts with completions out of files: rows stay together, whatever the split."""

from __future__ import annotations

import json

import pytest

from gpt2jax.data.pairs import load_pairs

ROWS = [{"ask": f"question {i}", "tell": f" answer {i}"} for i in range(40)]


def write(path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_pairs_of_a_file_are_split_whole(tmp_path):
    write(tmp_path / "rows.jsonl", ROWS)
    parts = {
        split: load_pairs(tmp_path / "rows.jsonl", "ask", "tell", split=split)
        for split in ("train", "validation", "test")
    }
    assert {len(parts["validation"]), len(parts["test"])} == {2}
    everything = [pair for part in parts.values() for pair in part]
    expected = [{"prompt": row["ask"], "completion": row["tell"]} for row in ROWS]
    assert sorted(everything, key=str) == sorted(expected, key=str)
    assert load_pairs(tmp_path / "rows.jsonl", "ask", "tell", split="all", limit=3) == expected[:3]


def test_pairs_of_named_files(tmp_path):
    write(tmp_path / "train.jsonl", ROWS[:5])
    write(tmp_path / "test.jsonl", ROWS[5:7])
    assert len(load_pairs(tmp_path, "ask", "tell")) == 5
    assert load_pairs(tmp_path, "ask", "tell", split="test")[0]["prompt"] == "question 5"
    with pytest.raises(ValueError, match="has no rows in its validation split"):
        load_pairs(tmp_path, "ask", "tell", split="validation")


def test_mistakes(tmp_path):
    write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(ValueError, match="completion_column=None: name both"):
        load_pairs(tmp_path / "rows.jsonl", "ask", None)
    with pytest.raises(ValueError, match="told"):
        load_pairs(tmp_path / "rows.jsonl", "ask", "told")
    with pytest.raises(FileNotFoundError, match="prompts and completions come from files"):
        load_pairs(tmp_path / "none.jsonl", "ask", "tell")
