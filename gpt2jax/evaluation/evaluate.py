"""Evaluates a model on texts: loss, accuracy, perplexity and bits per byte, from the loss of every token.

The texts are read, scored and summed up chunk by chunk: apart from a few sums a document, memory does not grow with
their number. Every figure is a sum over documents in float64, in the order of the texts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from gpt2jax.data.batches import check_long_enough
from gpt2jax.data.documents import Documents
from gpt2jax.evaluation.accumulators import (
    DocumentSums,
    TokenScores,
    loss_breakdown,
    sum_by_document,
    sum_text,
)
from gpt2jax.evaluation.config import EvaluationConfig
from gpt2jax.evaluation.keras_metrics import score_keras_rows
from gpt2jax.evaluation.result import Evaluation
from gpt2jax.evaluation.resume import State, read_state, write_state
from gpt2jax.evaluation.scoring import Scorer, score_windows
from gpt2jax.evaluation.texts import CHUNK_SIZE, tokenize_chunk
from gpt2jax.evaluation.windows import plan_rolling_windows, plan_windows, truncate_documents
from gpt2jax.language_model import LanguageModel
from gpt2jax.utils.fingerprint import add_text, params_fingerprint
from gpt2jax.utils.progress import evaluation_progress
from gpt2jax.utils.validation import check_model, check_path, check_texts


def evaluate(
    model: LanguageModel,
    texts: Iterable[Any],
    config: EvaluationConfig | None = None,
    *,
    devices: Sequence[Any] | None = None,
    per_token: bool = False,
    state: str | pathlib.Path | None = None,
    resume: bool = False,
    progress: bool = False,
    **overrides: Any,
) -> Evaluation:
    """Compute loss and accuracy of a model on texts.

    An end token goes in front of each text, and an end token is the last label. A text without tokens counts with that
    label alone.

    Args:
        model: a model with or without adapters.
        texts: strings, lists of token ids, or a column of a `datasets.Dataset`; a list, or an iterator, of which at
            most `CHUNK_SIZE` texts are held at once.
        config: settings; default: `EvaluationConfig()`.
        devices: jax devices that share each batch's rows. Default: all devices of this process.
        per_token: keep the scores of every token as well, 20 bytes each.
        state: file for the sums so far, replaced after each chunk of texts.
        resume: continue from that file. The texts must be the same; those that are done are read, but not scored.
        progress: show a progress bar.
        **overrides: fields of `EvaluationConfig`, such as `sequence_length=64`; they win over `config`.

    Raises:
        ValueError: there are no texts, no text has two tokens, a setting is not legal, or the state belongs to another
            evaluation.
        TypeError: an unknown setting, or `texts` is one string, or not a list.
    """
    began = time.perf_counter()
    check_model("model", model)
    config = EvaluationConfig.merge(config, overrides, evaluate.__kwdefaults__).resolve(
        model.config.n_positions
    )
    check_texts("texts", texts)
    if state is not None and per_token:
        raise ValueError("per_token must be False with a state file, got True; the file holds no tokens")
    if resume and state is None:
        raise ValueError("resume must be False without a state file, got True; name it with state=")
    path = None if state is None else check_path("state", state)
    identity = {} if path is None else _identity(model, config)
    found = read_state(path, identity) if path is not None and resume else State()
    iterator, digest, earlier = iter(texts), hashlib.sha256(), found.seconds
    _skip_done(iterator, found, digest)
    scorer = Scorer(model, config.compute_dtype, devices)
    kept: list[TokenScores] = []
    size = len(texts) if hasattr(texts, "__len__") else None  # pyright: ignore[reportArgumentType]
    with evaluation_progress(size, found.documents, progress) as advance:
        while chunk := list(itertools.islice(iterator, CHUNK_SIZE)):
            try:
                scored, scores = _score_chunk(model, chunk, config, scorer, advance)
            except ValueError as error:
                if found.documents:  # the error names a text by its place in the chunk
                    raise ValueError(f"counted from text {found.documents}: {error}") from error
                raise
            for text in chunk:
                add_text(digest, text)
            seconds = earlier + time.perf_counter() - began
            scored = dataclasses.replace(scored, data_sha256=digest.hexdigest(), seconds=seconds)
            found = found.extend(scored)
            if path is not None:
                write_state(path, found, identity)
            if per_token:
                kept.append(scores)
    if found.per_document is None or found.breakdown is None:
        raise ValueError("there are no texts: the data set is empty")
    if found.longest < 2:
        check_long_enough(Documents(np.empty(0), np.zeros(found.documents + 1, np.int64)))
    return Evaluation(
        config,
        found.per_document,
        found.breakdown,
        has_text=model.tokenizer is not None,
        data_sha256=digest.hexdigest(),
        seconds=earlier + time.perf_counter() - began,
        per_token=TokenScores.join(kept) if per_token else None,
    )


def _identity(model: LanguageModel, config: EvaluationConfig) -> dict[str, Any]:
    """Return what a state file belongs to."""
    model_hash = params_fingerprint((model.params, model.adapters))
    return dataclasses.asdict(config) | {"chunk_size": CHUNK_SIZE, "model": model_hash}


def _skip_done(texts: Iterator[Any], found: State, digest: Any) -> None:
    """Move on to the first text that is not done; raise ValueError if the texts before it are not the same."""
    skipped = 0
    for text in itertools.islice(texts, found.documents):
        add_text(digest, text)
        skipped += 1
    if found.documents and (skipped < found.documents or digest.hexdigest() != found.data_sha256):
        raise ValueError(
            f"the state file belongs to {found.documents:,} other texts than the first {skipped:,} here; "
            "do not resume from it"
        )


def _score_chunk(
    model: LanguageModel,
    texts: Sequence[Any],
    config: EvaluationConfig,
    scorer: Scorer,
    advance: Callable[[float], None],
) -> tuple[State, TokenScores]:
    """Score some texts: their sums, and the scores of every token."""
    length, end = config.length, model.end_token_id
    documents = tokenize_chunk(model, texts, config)
    if config.windows == "truncate":
        short = truncate_documents(documents, length - 1)
        truncated = documents.lengths > short.lengths
        scores, on_padding = score_keras_rows(scorer, short, config, end, advance)
    else:
        truncated, on_padding = np.zeros(len(texts), bool), np.zeros(len(texts), np.int64)
        if config.windows == "rolling":
            windows = plan_rolling_windows(documents, length)
        else:
            windows = plan_windows(documents, length, config.stride or length)
        scores = score_windows(
            scorer,
            documents,
            windows,
            sequence_length=length,
            batch_size=config.batch_size,
            end_token_id=end,
            advance=lambda rows: advance(rows * len(texts) / len(windows)),
        )
    vocab_size = model.config.vocab_size
    per_document = DocumentSums(
        tokens=np.diff(scores.offsets),
        loss=sum_by_document(scores.loss, scores.offsets),
        correct=sum_by_document(scores.rank == 0, scores.offsets, np.int64),
        correct_top5=sum_by_document(scores.rank < 5, scores.offsets, np.int64),
        **sum_text(scores, model.tokenizer, vocab_size),
        correct_on_padding=on_padding,
        truncated=truncated,
    )
    breakdown = loss_breakdown(scores, end_token_id=end, sequence_length=length, vocab_size=vocab_size)
    return State(per_document, breakdown, longest=int(documents.lengths.max())), scores
