"""Prompts with completions from two columns of one's own files."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

from gpt2jax.data.readers import list_files, read_texts
from gpt2jax.data.sources import split_by_name, split_texts
from gpt2jax.utils.validation import check_path

# stands between the two parts of a pair while the pairs are split as texts; no text holds it
_BETWEEN = "\x00\x1e\x00"

Pair = dict[str, str]


def load_pairs(
    source: str | os.PathLike[str],
    prompt_column: str | None,
    completion_column: str | None,
    *,
    split: str = "train",
    limit: int | None = None,
) -> list[Pair]:
    """Rows {"prompt", "completion"} of a file or a folder of files; splits are those of `load_texts`.

    Args:
        source: a file or folder of .jsonl, .json, .csv, .tsv or .parquet files.
        prompt_column, completion_column: the two columns, both of texts.
        split: "train", "validation", "test" or "all".
        limit: at most so many, the first ones.

    Raises:
        ValueError: a column is not named or not there, or there is no row in that split.
        FileNotFoundError: there is no such file.
    """
    if prompt_column is None or completion_column is None:
        raise ValueError(
            f"prompt_column={prompt_column!r} and completion_column={completion_column!r}: name both"
        )
    path = check_path("source", source)
    if not path.exists():
        raise FileNotFoundError(
            f"there is no file or folder {source}; prompts and completions come from files"
        )
    files = list_files(path)
    named = [split_by_name(file.path) for file in files]
    if any(named) and split != "all":
        files = [file for file, name in zip(files, named, strict=True) if name == split]

    def joined() -> Iterator[str]:
        for file in files:
            columns = (read_texts(file, column) for column in (prompt_column, completion_column))
            yield from map(_BETWEEN.join, zip(*columns, strict=True))

    texts = joined() if any(named) else split_texts(joined(), split)
    pairs = [text.split(_BETWEEN) for text in itertools.islice(texts, limit)]
    if not pairs:
        raise ValueError(f"{source} has no rows in its {split} split")
    return [{"prompt": pair[0], "completion": pair[1]} for pair in pairs if len(pair) == 2]
