"""Tokenizes texts to `Documents`, in memory or through the cache."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from gpt2jax.data.documents import Documents, to_offsets
from gpt2jax.data.encoding import write_chunks
from gpt2jax.data.token_cache import cached_documents
from gpt2jax.tokenizer.bpe import Tokenizer
from gpt2jax.utils.validation import check_texts


def tokenize_documents(
    texts: Iterable[Any],
    tokenizer: Tokenizer | None,
    *,
    vocab_size: int,
    cache: str | pathlib.Path | None = None,
    progress: bool = False,
) -> Documents:
    """Tokenize texts (strings, sequences of token ids, or prompts with completions) to `Documents`.

    The texts are read chunk by chunk; only their ids are kept in memory, with a `cache` not even those.

    Args:
        texts: list of str, list of id sequences, list of {"prompt": ..., "completion": ...} (both strings or both
            ids; labels are the completion's only), a column of a `datasets.Dataset`, or any iterable of these.
        tokenizer: encodes the strings; may be None if all texts are ids.
        vocab_size: ids must be below it.
        cache: folder of files with ids, which are read as they are needed. Texts that the same tokenizer encoded
            before are taken from there; see `gpt2jax.data.token_cache`.
        progress: show a progress bar.

    Raises:
        ValueError: there is no text, an id is out of range, or a text is a string and `tokenizer` is None.
        TypeError: `texts` is one string, or not a list.
    """
    check_texts("texts", texts)
    if cache is not None:
        return cached_documents(texts, tokenizer, vocab_size=vocab_size, cache=cache, progress=progress)
    chunks: list[np.ndarray] = []
    lengths, prompts = write_chunks(texts, tokenizer, vocab_size, chunks.append, progress=progress)
    return Documents(np.concatenate(chunks), to_offsets(lengths), prompts)
