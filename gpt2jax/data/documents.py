"""Tokenized documents: one flat array of ids and where each document begins."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gpt2jax.utils.validation import check_texts

# texts are encoded in pieces of about so many characters: enough for every core, and little to hold
PIECE = 1 << 22


@dataclasses.dataclass(frozen=True)
class Documents:
    """Token ids of documents, end to end.

    Attributes:
        tokens: [total] uint16 or int32, without end tokens; may be memory-mapped.
        offsets: [n + 1] int64; document i is `tokens[offsets[i]:offsets[i + 1]]`.
        prompts: [n] int64, how many leading tokens of each document are context only: never a label that counts.
            None: no document has any.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    prompts: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """[n] number of tokens of each document."""
        return np.diff(self.offsets)

    @property
    def sha256(self) -> str:
        """Digest (hex) of ids, borders and prompts."""
        arrays = [self.tokens, self.offsets, *([] if self.prompts is None else [self.prompts])]
        digest = hashlib.sha256()
        for array in arrays:
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def tokenize_documents(
    texts: Iterable[Any],
    tokenizer: Any,
    *,
    vocab_size: int,
    cache: str | pathlib.Path | None = None,
    progress: bool = False,
) -> Documents:
    """Texts (strings, sequences of token ids, or prompts with completions) as `Documents`.

    The texts are walked through piece by piece; only the ids are kept, or with a `cache` not even those.

    Args:
        texts: list of str, list of id sequences, list of {"prompt": ..., "completion": ...} (both strings or both
            ids: the prompt is no label), a column of a `datasets.Dataset`, or any iterable of these.
        tokenizer: encodes the strings; may be None when all texts are ids.
        vocab_size: ids must be below it.
        cache: folder where the ids are written to and mapped from. What was tokenized once, by the same tokenizer,
            is taken from there; see `gpt2jax.data.token_cache`.
        progress: show a progress bar.

    Raises:
        ValueError: there is no text, an id is out of range, or a string came without a tokenizer.
        TypeError: `texts` is one string, or no list.
    """
    check_texts("texts", texts)
    if cache is not None:
        from gpt2jax.data.token_cache import cached_documents

        return cached_documents(texts, tokenizer, vocab_size=vocab_size, cache=cache, progress=progress)
    pieces: list[np.ndarray] = []
    lengths, prompts = write_pieces(texts, tokenizer, vocab_size, pieces.append, progress=progress)
    return Documents(np.concatenate(pieces), to_offsets(lengths), prompts)


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest dtype that documents of such a vocabulary are kept in."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)


def to_offsets(lengths: np.ndarray) -> np.ndarray:
    """[n] lengths -> [n + 1] where each document begins, and the end."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def write_pieces(
    texts: Iterable[Any],
    tokenizer: Any,
    vocab_size: int,
    write: Callable[[np.ndarray], Any],
    *,
    progress: bool = False,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Encodes texts piece by piece and hands the ids of each piece to `write`.

    Returns:
        ([n] lengths, [n] prompt lengths or None).

    Raises:
        ValueError: as `tokenize_documents`.
    """
    from gpt2jax.utils.data_progress import tokenization_progress

    lengths: list[np.ndarray] = []
    prompts: list[np.ndarray] = []
    done = 0
    with tokenization_progress(texts, show=progress) as count:
        for piece, characters in cut_in_pieces(texts):
            rows, prompt_lengths = _encode(piece, tokenizer, first=done)
            sizes = np.fromiter(map(len, rows), np.int64, len(rows))
            ids = np.fromiter(itertools.chain.from_iterable(rows), np.int64, sizes.sum())
            _check_range(ids, sizes, vocab_size, first=done)
            write(ids.astype(token_dtype(vocab_size)))
            lengths.append(sizes)
            prompts.append(prompt_lengths)
            done += len(piece)
            count(len(piece), characters, len(ids))
    if not done:
        raise ValueError("there are no texts: the data set is empty")
    all_prompts = np.concatenate(prompts)
    return np.concatenate(lengths), all_prompts if all_prompts.any() else None


def cut_in_pieces(texts: Iterable[Any]) -> Iterator[tuple[list[Any], int]]:
    """Lists of texts of about `PIECE` characters together, and how many these are."""
    piece: list[Any] = []
    size = 0
    for text in texts:
        piece.append(text)
        parts = text.values() if isinstance(text, Mapping) else (text,)
        size += sum(len(part) if hasattr(part, "__len__") else 1 for part in parts)
        if size >= PIECE:
            yield piece, size
            piece, size = [], 0
    if piece:
        yield piece, size


def _encode(texts: list[Any], tokenizer: Any, *, first: int) -> tuple[list[Any], np.ndarray]:
    """([n] ids of each text, [n] how many of them are its prompt)."""
    parts: list[Any] = []
    for index, text in enumerate(texts, start=first):
        if text is None:  # a null in a column
            raise ValueError(f"text {index} is neither a string nor a list of token ids: None")
        parts += prompt_and_completion(text, index) if isinstance(text, Mapping) else (None, text)
    given = [part for part in parts if part is not None]
    if all(isinstance(part, str) for part in given):
        if tokenizer is None:
            raise ValueError("the model has no tokenizer: pass texts as lists of token ids")
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
    """The two parts of text number `index`.

    Raises:
        ValueError: one of them is missing.
    """
    if not {"prompt", "completion"} <= set(text):
        raise ValueError(
            f"text {index} has the columns {', '.join(map(repr, text))}; expected 'prompt' and 'completion'"
        )
    return text["prompt"], text["completion"]


def _check_range(ids: np.ndarray, sizes: np.ndarray, vocab_size: int, *, first: int) -> None:
    bad = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if bad.size:
        text = first + int(np.searchsorted(np.cumsum(sizes), bad[0], side="right"))
        raise ValueError(
            f"text {text} has token id {ids[bad[0]]}; the vocabulary has ids 0 to {vocab_size - 1}"
        )


def _as_ids(text: Any, index: int, tokenizer: Any) -> Sequence[int] | np.ndarray:
    if isinstance(text, str):
        if tokenizer is None:
            raise ValueError("the model has no tokenizer: pass texts as lists of token ids")
        return tokenizer.encode(text)
    ids = np.asarray(text)
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise ValueError(f"text {index} is neither a string nor a list of token ids: {text!r:.60}")
    return ids
