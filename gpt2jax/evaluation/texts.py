"""Turns the texts of an evaluation into token ids, chunk by chunk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gpt2jax.data.batches import check_long_enough
from gpt2jax.data.documents import Documents
from gpt2jax.data.tokenization import tokenize_documents
from gpt2jax.evaluation.config import EvaluationConfig
from gpt2jax.evaluation.windows import encode_first_tokens
from gpt2jax.language_model import LanguageModel

CHUNK_SIZE = 1024  # documents that are read, scored and summed up at once


def tokenize_chunk(
    model: LanguageModel, texts: Sequence[Any], config: EvaluationConfig | None = None
) -> Documents:
    """Return texts as documents; of truncated ones at least the first T tokens."""
    for index, text in enumerate(texts):
        if isinstance(text, Mapping):
            raise ValueError(
                f"text {index} has the columns {', '.join(map(repr, text))}; pass one column of them, not all"
            )
    # to tokenize whole articles takes longer than to score their beginnings
    if config is not None and config.windows == "truncate" and model.tokenizer is not None:
        texts = list(texts)
        strings = [index for index, text in enumerate(texts) if isinstance(text, str)]
        encoded = encode_first_tokens(model.tokenizer, [texts[index] for index in strings], config.length)
        for index, ids in zip(strings, encoded, strict=True):
            texts[index] = ids
    return tokenize_documents(texts, model.tokenizer, vocab_size=model.config.vocab_size)


def check_scorable(model: LanguageModel, texts: Sequence[Any]) -> None:
    """Raise ValueError if no text has two tokens; reads no further than the first that has."""
    for text in texts:
        beginning = text[:1000] if isinstance(text, str) else text
        if len(tokenize_chunk(model, [beginning])[0]) >= 2:
            return
    check_long_enough(tokenize_chunk(model, texts))
