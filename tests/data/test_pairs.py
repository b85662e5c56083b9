"""Prompts with completions: rows stay together, whatever the split."""

from __future__ import annotations

import json
from typing import Any

import datasets
import pytest

from gpt2jax.data.sources import Texts

ROWS = [{"ask": f"question {i}", "tell": f" answer {i}"} for i in range(40)]
PAIRS = [{"prompt": row["ask"], "completion": row["tell"]} for row in ROWS]
COLUMNS: dict[str, Any] = {"prompt_column": "ask", "completion_column": "tell"}


def write(path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_texts_split_pairs_of_a_file_by_content(tmp_path):
    write(tmp_path / "rows.jsonl", ROWS)
    parts = {
        split: list(Texts(tmp_path / "rows.jsonl", split, **COLUMNS))
        for split in ("train", "validation", "test")
    }
    # which rows are held out follows from a hash, and stays
    assert [pair["prompt"] for pair in parts["validation"]] == ["question 3", "question 32"]
    assert len(parts["test"]) == 2
    everything = [pair for part in parts.values() for pair in part]
    assert sorted(everything, key=str) == sorted(PAIRS, key=str)
    assert list(Texts(tmp_path / "rows.jsonl", "all", limit=3, **COLUMNS)) == PAIRS[:3]


def test_texts_read_pairs_of_named_files_and_of_datasets(tmp_path):
    write(tmp_path / "train.jsonl", ROWS[:5])
    write(tmp_path / "test.jsonl", ROWS[5:7])
    write(tmp_path / "dev.jsonl", ROWS[7:])
    assert list(Texts(tmp_path, **COLUMNS)) == PAIRS[:5]
    assert list(Texts(tmp_path, "test[:50%]", **COLUMNS)) == PAIRS[5:6]
    with pytest.raises(ValueError, match="there is no split 'held'; known: validation, test, train, all"):
        list(Texts(tmp_path, "held", **COLUMNS))
    assert list(Texts(datasets.Dataset.from_list(ROWS), "all", **COLUMNS)) == PAIRS


def test_texts_refuse_wrong_columns_of_pairs(tmp_path):
    write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(ValueError, match="completion_column=None: name both"):
        Texts(tmp_path / "rows.jsonl", prompt_column="ask")
    with pytest.raises(ValueError, match="text_column has no effect"):
        Texts(tmp_path / "rows.jsonl", text_column="a", **COLUMNS)
    with pytest.raises(ValueError, match="no text column 'told'; its columns: ask, tell"):
        list(Texts(tmp_path / "rows.jsonl", prompt_column="ask", completion_column="told"))
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        list(Texts(tmp_path / "none.jsonl", **COLUMNS))


def test_texts_do_not_slice_pairs(tmp_path):
    write(tmp_path / "rows.jsonl", ROWS[:2])
    with pytest.raises(ValueError, match="2 different rows are too few to split by content"):
        list(Texts(tmp_path / "rows.jsonl", **COLUMNS))
    assert list(Texts(tmp_path / "rows.jsonl", "all", **COLUMNS)) == PAIRS[:2]
