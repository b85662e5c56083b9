"""Files of texts for the tests of data."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet

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
