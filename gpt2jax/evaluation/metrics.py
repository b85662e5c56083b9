"""Loss, accuracy, perplexity and bits per byte of a model on texts, from the loss of every single token.

The loss and hit of each scored token are fetched and kept (5 bytes a token; logits never leave the device),
and every figure is a sum over them in float64 in the order of the texts: no figure depends on how the rows
    were batched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt2jax.config import GPT2Config
from gpt2jax.data.batches import Batch, check_long_enough
from gpt2jax.data.documents import Documents, tokenize_documents
from gpt2jax.evaluation.evaluation import Evaluation, Settings
from gpt2jax.evaluation.windows import (
    Windows,
    check_windows,
    cut_documents,
    encode_beginnings,
    plan_windows,
    row_batches,
    study_batches,
)
from gpt2jax.language_model import LanguageModel
from gpt2jax.losses import token_losses
from gpt2jax.model import Params, head_kernel, hidden_states
from gpt2jax.precision import Precision, precision
from gpt2jax.tokenizer import Tokenizer


def evaluate(
    model: LanguageModel,
    texts: Iterable[Any],
    *,
    sequence_length: int = 128,
    batch_size: int = 32,
    windows: str = "first",
    stride: int | None = None,
    compute_dtype: str = "float32",
    progress: bool = False,
) -> Evaluation:
    """Loss and accuracy of a model on texts.

    The end token goes in front of each text and is the label behind it. An empty text counts with its end
    token.

    Args:
        model: a model, with adapters or without.
        texts: list of str, of lists of token ids, or a column of a `datasets.Dataset`.
        sequence_length: T, the most tokens a row holds.
        batch_size: B, rows at once. It changes time and memory, not the figures.
        windows: "first" (the first T - 1 tokens of each text, as in the study), "disjoint" or "sliding" (the
            whole of each text). The study's own two figures are of the first T - 1 tokens in any case.
        stride: with "sliding", labels each row advances; T - stride is the least context. Default T // 2.
        compute_dtype: "float32", "bfloat16" or "float16", of the matrix products.
        progress: show a progress bar.

    Returns:
        An `Evaluation`.

    Raises:
        ValueError: there are no texts, none has two tokens, or a setting is out of range.
        TypeError: `texts` is one string.
    """
    began = time.perf_counter()
    settings = check_settings(model, sequence_length, batch_size, windows, stride, compute_dtype)
    if isinstance(texts, str | bytes):
        raise TypeError("texts is one string; pass a list of texts")
    # the study's windows need the beginnings only, and reading whole articles takes longer than scoring them
    documents = _tokenize(model, list(texts), first=sequence_length if windows == "first" else None)
    check_long_enough(documents)
    end = model.end_token_id
    first = cut_documents(documents, sequence_length - 1)
    first_rows = plan_windows(first, sequence_length, sequence_length)
    scored, rows = first, first_rows
    if windows != "first":
        scored, rows = documents, plan_windows(documents, sequence_length, settings.stride)
    score = functools.partial(
        _score,
        params=model.merge_adapter().params,
        config=model.config,
        numerics=precision(compute_dtype),
        end_token_id=end,
        settings=settings,
    )
    with _progress(len(first_rows) + (len(rows) if rows is not first_rows else 0), progress) as advance:
        study = score(first, first_rows, study=True, advance=advance)
        found = study if rows is first_rows else score(scored, rows, study=False, advance=advance)
    labels = np.insert(scored.tokens.astype(np.int32), scored.offsets[1:], end)
    token_bytes = None
    if model.tokenizer is not None:
        token_bytes = byte_lengths(model.tokenizer, model.config.vocab_size)[labels]
    return Evaluation(
        settings=settings,
        offsets=rows.offsets,
        labels=labels,
        positions=rows.positions(),
        token_loss=found.loss,
        token_hit=found.hit,
        token_bytes=token_bytes,
        documents_cut=int((documents.lengths > scored.lengths).sum()),
        keras_loss_sum=float(study.loss.sum(dtype=np.float64)),
        keras_hits=int(study.hit.sum()) + study.hits_on_padding,
        keras_positions=len(documents) * sequence_length,
        seconds=time.perf_counter() - began,
    )


def check_settings(
    model: LanguageModel,
    sequence_length: int,
    batch_size: int,
    windows: str,
    stride: int | None,
    compute_dtype: str,
) -> Settings:
    """The settings, or ValueError naming the one that is wrong."""
    for name, value, least in (("sequence_length", sequence_length, 2), ("batch_size", batch_size, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")
    context = model.config.n_positions
    if sequence_length > context:
        raise ValueError(f"sequence_length={sequence_length} is over the model's context of {context} tokens")
    precision(compute_dtype)
    stride = check_windows(windows, sequence_length, stride)
    return Settings(sequence_length, windows, stride, batch_size, compute_dtype)


def check_texts(model: LanguageModel, texts: Sequence[Any]) -> None:
    """Raises ValueError where no text has two tokens; reads no further than the first that has."""
    for text in texts:
        beginning = text[:1000] if isinstance(text, str) else text
        if len(_tokenize(model, [beginning])[0]) >= 2:
            return
    check_long_enough(_tokenize(model, texts))


def _tokenize(model: LanguageModel, texts: Sequence[Any], first: int | None = None) -> Documents:
    """The texts as documents, of which the first `first` tokens are wanted, or all."""
    if first is not None and model.tokenizer is not None:
        strings = [index for index, text in enumerate(texts) if isinstance(text, str)]
        beginnings = encode_beginnings(model.tokenizer, [texts[index] for index in strings], first)
        texts = list(texts)
        for index, ids in zip(strings, beginnings, strict=True):
            texts[index] = ids
    return tokenize_documents(texts, model.tokenizer, vocab_size=model.config.vocab_size)


@dataclasses.dataclass(frozen=True)
class _Scores:
    """Result of a pass: loss [tokens] float32, hit [tokens] bool, and the hits on padding of a study pass."""

    loss: np.ndarray
    hit: np.ndarray
    hits_on_padding: int


def _score(
    documents: Documents,
    windows: Windows,
    *,
    params: Params,
    config: GPT2Config,
    numerics: Precision,
    end_token_id: int,
    study: bool,
    settings: Settings,
    advance: Callable[[int], None],
) -> _Scores:
    loss = np.empty(windows.offsets[-1], np.float32)
    hit = np.empty(windows.offsets[-1], bool)
    hits_on_padding = 0
    size = {"sequence_length": settings.sequence_length, "batch_size": settings.batch_size}
    if study:
        batches = study_batches(documents, **size, end_token_id=end_token_id)
    else:
        batches = row_batches(documents, windows, **size, end_token_id=end_token_id)

    def run() -> Iterator[tuple[np.ndarray, Batch, tuple[jax.Array, jax.Array]]]:
        for chosen, batch in batches:
            inputs = (batch["tokens"], batch["targets"], batch.get("mask"))
            yield chosen, batch, _token_scores(params, *inputs, config=config, numerics=numerics)

    for chosen, batch, results in _one_ahead(run()):
        row_loss, row_hit = (np.asarray(x) for x in results)
        for row, index in enumerate(chosen):
            kept = np.flatnonzero(batch["weights"][row])
            start = windows.offsets[windows.document[index]] + windows.score[index]
            loss[start : start + len(kept)] = row_loss[row, kept]
            hit[start : start + len(kept)] = row_hit[row, kept]
        if study:
            real = len(chosen)
            hits_on_padding += int((row_hit[:real] & (batch["weights"][:real] == 0)).sum())
        advance(len(chosen))
    return _Scores(loss, hit, hits_on_padding)


@functools.partial(jax.jit, static_argnames=("config", "numerics"))
def _token_scores(params, tokens, targets, mask, *, config, numerics):
    # positions run on over padding, as in Keras; padding is on the right, so no other figure depends on it
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = hidden_states(
        params, config, tokens, positions=positions, attention_mask=mask, precision=numerics
    )
    return token_losses(hidden, head_kernel(params), targets, numerics)


def _one_ahead(results: Iterator[Any]) -> Iterator[Any]:
    """The same items, each held back until the next is under way: the device works as the host collects."""
    held = next(results, None)
    for item in results:
        yield held
        held = item
    if held is not None:
        yield held


@functools.lru_cache(maxsize=8)
def byte_lengths(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """[V] int32 length in bytes of every token id; 0 for special tokens and for ids that have no text."""
    lengths = np.zeros(vocab_size, np.int32)
    special = set(tokenizer.special_tokens.values())
    for token_id in range(min(vocab_size, tokenizer.vocab_size)):
        if token_id not in special:
            try:
                lengths[token_id] = len(tokenizer.decode_bytes([token_id]))
            except ValueError:  # a hole in the vocabulary: no text encodes to it
                continue
    return lengths


@contextlib.contextmanager
def _progress(total: int, show: bool) -> Iterator[Callable[[int], None]]:
    """Yields `advance(rows)`: a bar on stderr, or nothing."""
    if not show:
        yield lambda rows: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("evaluating", total=total)
        yield lambda rows: progress.advance(task, rows)
