"""Texts to token ids, chunk by chunk."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gpt2jax.data.documents import token_dtype
from gpt2jax.tokenizer.bpe import Tokenizer
from gpt2jax.utils.progress import tokenization_progress

# characters of the texts that are encoded at once: enough for every core, and little to hold
CHUNK_SIZE = 1 << 22
_NO_TOKENIZER = (
    "the model has no tokenizer: name one with load(..., tokenizer=...), in the commands with --tokenizer, or pass "
    "texts as lists of token ids"
)


def write_chunks(
    texts: Iterable[Any],
    tokenizer: Tokenizer | None,
    vocab_size: int,
    write: Callable[[np.ndarray], Any],
    *,
    progress: bool = False,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Encode texts chunk by chunk and hand the ids of each chunk to `write`.

    Returns:
        ([n] lengths, [n] prompt lengths or None).

    Raises:
        ValueError: as `tokenize_documents`.
    """
    lengths: list[np.ndarray] = []
    prompts: list[np.ndarray] = []
    done = 0
    with tokenization_progress(texts, show=progress) as count:
        for chunk, characters in iter_chunks(texts):
            rows, prompt_lengths = _encode(chunk, tokenizer, first=done)
            sizes = np.fromiter(map(len, rows), np.int64, len(rows))
            ids = np.fromiter(itertools.chain.from_iterable(rows), np.int64, sizes.sum())
            _check_range(ids, sizes, vocab_size, first=done)
            write(ids.astype(token_dtype(vocab_size)))
            lengths.append(sizes)
            prompts.append(prompt_lengths)
            done += len(chunk)
            count(len(chunk), characters, len(ids))
    if not done:
        raise ValueError("there are no texts: the data set is empty")
    all_prompts = np.concatenate(prompts)
    return np.concatenate(lengths), all_prompts if all_prompts.any() else None


def iter_chunks(texts: Iterable[Any]) -> Iterator[tuple[list[Any], int]]:
    """Yield lists of texts of about `CHUNK_SIZE` characters (or token ids) in total, each with that total."""
    chunk: list[Any] = []
    size = 0
    for text in texts:
        chunk.append(text)
        parts = text.values() if isinstance(text, Mapping) else (text,)
        size += sum(len(part) if hasattr(part, "__len__") else 1 for part in parts)
        if size >= CHUNK_SIZE:
            yield chunk, size
            chunk, size = [], 0
    if chunk:
        yield chunk, size


def _encode(texts: list[Any], tokenizer: Tokenizer | None, *, first: int) -> tuple[list[Any], np.ndarray]:
    """Return ([n] ids of each text, [n] how many of them are its prompt); `first` numbers the texts in errors."""
    parts: list[Any] = []
    for index, text in enumerate(texts, start=first):
        if text is None:  # a null in a column
            raise ValueError(f"text {index} is neither a string nor a list of token ids: None")
        parts += prompt_and_completion(text, index) if isinstance(text, Mapping) else (None, text)
    given = [part for part in parts if part is not None]
    if all(isinstance(part, str) for part in given):
        if tokenizer is None:
            raise ValueError(_NO_TOKENIZER)
        encoded = iter(tokenizer.encode_batch(given))
    else:
        numbers = (first + position // 2 for position, part in enumerate(parts) if part is not None)
        encoded = iter(
            [_as_ids(part, number, tokenizer) for part, number in zip(given, numbers, strict=True)]
        )
    parts = [() if part is None else next(encoded) for part in parts]
    rows, prompts = [], np.zeros(len(texts), np.int64)
    for index, (prompt, completion) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
        prompts[index] = len(prompt)
        rows.append(completion if len(prompt) == 0 else [*prompt, *completion])
    return rows, prompts


def prompt_and_completion(text: Mapping[str, Any], index: int) -> tuple[Any, Any]:
    """Return the two parts of text number `index`.

    Raises:
        ValueError: one of them is missing.
    """
    if not {"prompt", "completion"} <= set(text):
        raise ValueError(
            f"text {index} has the columns {', '.join(map(repr, text))}; expected 'prompt' and 'completion'"
        )
    return text["prompt"], text["completion"]


def _check_range(ids: np.ndarray, sizes: np.ndarray, vocab_size: int, *, first: int) -> None:
    """Raise ValueError for an id outside of the vocabulary, with the number of its text."""
    bad = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if bad.size:
        text = first + int(np.searchsorted(np.cumsum(sizes), bad[0], side="right"))
        raise ValueError(
            f"text {text} has token id {ids[bad[0]]}; the vocabulary has ids 0 to {vocab_size - 1}"
        )


def _as_ids(text: Any, index: int, tokenizer: Tokenizer | None) -> Sequence[int] | np.ndarray:
    """Return the ids of one text, which may be ids already."""
    if isinstance(text, str):
        if tokenizer is None:
            raise ValueError(_NO_TOKENIZER)
        return tokenizer.encode(text)
    ids = np.asarray(text)
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise ValueError(f"text {index} is neither a string nor a list of token ids: {text!r:.60}")
    # ids from 2**63 on are outside of every vocabulary, and of the int64 in which that is checked
    return np.minimum(ids, np.iinfo(np.int64).max) if ids.dtype == np.uint64 else ids
