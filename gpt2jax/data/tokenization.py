"""Texts to `Documents`: in memory, or through the cache of tokenized data sets."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from gpt2jax.data.documents import Documents, to_offsets
from gpt2jax.data.encoding import write_pieces
from gpt2jax.data.token_cache import cached_documents
from gpt2jax.utils.validation import check_texts


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
        return cached_documents(texts, tokenizer, vocab_size=vocab_size, cache=cache, progress=progress)
    pieces: list[np.ndarray] = []
    lengths, prompts = write_pieces(texts, tokenizer, vocab_size, pieces.append, progress=progress)
    return Documents(np.concatenate(pieces), to_offsets(lengths), prompts)
