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
from gpt2jax.utils.jax_switches import default_switches
from gpt2jax.utils.notices import enumerate_names, notice
from gpt2jax.utils.progress import evaluation_progress
from gpt2jax.utils.validation import (
    check_model,
    check_names,
    check_path,
    check_texts,
    field_names,
    override_fields,
)

# the arguments of `evaluate` that are not settings: a wrong name may be meant as one of them
_ARGUMENTS = ("devices", "per_token", "state", "resume", "progress")


@default_switches()
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
    check_names("setting", overrides, [*field_names(EvaluationConfig), *_ARGUMENTS])
    config = override_fields("config", EvaluationConfig, config, overrides)
    config = config.resolve(model.config.n_positions)
    check_texts("texts", texts)
    path = _state_path(state, resume=resume, per_token=per_token)
    identity = {} if path is None else _identity(model, config)
    found = read_state(path, identity) if path is not None and resume else State()
    began -= found.seconds
    iterator = iter(texts)
    digest = _skip_done(iterator, found)
    scorer = Scorer(model, config.compute_dtype, devices)
    kept: list[TokenScores] = []
    size = len(texts) if hasattr(texts, "__len__") else None  # pyright: ignore[reportArgumentType]
    with evaluation_progress(size, found.documents, progress) as advance:
        while chunk := list(itertools.islice(iterator, CHUNK_SIZE)):
            scored, scores = _score_chunk(model, chunk, config, scorer, advance, first=found.documents)
            _add_texts(digest, chunk)
            found = _finish(found.extend(scored), digest, began)
            if path is not None:
                write_state(path, found, identity)
            if per_token:
                kept.append(scores)
    return _result(model, config, _finish(found, digest, began), TokenScores.join(kept) if kept else None)


def _state_path(state: str | pathlib.Path | None, *, resume: bool, per_token: bool) -> pathlib.Path | None:
    if state is not None and per_token:
        raise ValueError("per_token must be False with a state file, got True; the file holds no tokens")
    if resume and state is None:
        raise ValueError("resume must be False without a state file, got True; name it with state=")
    return None if state is None else check_path("state", state)


def _identity(model: LanguageModel, config: EvaluationConfig) -> dict[str, Any]:
    """Return what a state file belongs to."""
    model_hash = params_fingerprint((model.params, model.adapters))
    return dataclasses.asdict(config) | {"chunk_size": CHUNK_SIZE, "model": model_hash}


def _skip_done(texts: Iterator[Any], found: State) -> Any:
    """Move on to the first text that is not done, and return the hash of those before it.

    Raises:
        ValueError: the texts before it are not those of the state.
    """
    digest = hashlib.sha256()
    skipped = _add_texts(digest, itertools.islice(texts, found.documents))
    if found.documents and (skipped < found.documents or digest.hexdigest() != found.data_sha256):
        raise ValueError(
            f"the state file belongs to {found.documents:,} other texts than the first {skipped:,} here; "
            "do not resume from it"
        )
    return digest


def _add_texts(digest: Any, texts: Iterable[Any]) -> int:
    """Add texts to a hash and return their number."""
    count = 0
    for text in texts:
        add_text(digest, text)
        count += 1
    return count


def _finish(found: State, digest: Any, began: float) -> State:
    """Return the sums with the hash of all texts so far, and the time."""
    seconds = time.perf_counter() - began
    return dataclasses.replace(found, data_sha256=digest.hexdigest(), seconds=seconds)


def _result(
    model: LanguageModel, config: EvaluationConfig, found: State, per_token: TokenScores | None
) -> Evaluation:
    """Return the figures of all chunks, or raise ValueError if nothing was scored."""
    if found.per_document is None or found.breakdown is None:
        raise ValueError("there are no texts: the data set is empty")
    if found.longest < 2:
        check_long_enough(Documents(np.empty(0), np.zeros(found.documents + 1, np.int64)))
    if broken := np.flatnonzero(~np.isfinite(found.per_document.loss)).tolist():
        count = f"{len(broken):,} of {found.documents:,} documents have no finite loss"
        numbers = enumerate_names([str(number) for number in broken])
        notice(f"{model.source or 'the model'}: {count}: {numbers}, counted from 0")
    return Evaluation(
        config,
        found.per_document,
        found.breakdown,
        has_text=model.tokenizer is not None,
        data_sha256=found.data_sha256,
        seconds=found.seconds,
        per_token=per_token,
    )


def _score_chunk(
    model: LanguageModel,
    texts: Sequence[Any],
    config: EvaluationConfig,
    scorer: Scorer,
    advance: Callable[[float], None],
    *,
    first: int,
) -> tuple[State, TokenScores]:
    """Score some texts, of which `first` is the number of the first: their sums, and the scores of every token."""
    length, end = config.length, model.end_token_id
    try:
        documents = tokenize_chunk(model, texts, config)
    except ValueError as error:
        if first:  # the error names a text by its place in the chunk
            raise ValueError(f"counted from text {first}: {error}") from error
        raise
    if config.windows == "truncate":
        short = truncate_documents(documents, length - 1)
        truncated = documents.lengths > short.lengths
        scores, correct_on_padding = score_keras_rows(scorer, short, config, end, advance)
    else:
        truncated, correct_on_padding = np.zeros(len(texts), bool), np.zeros(len(texts), np.int64)
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
        correct_on_padding=correct_on_padding,
        truncated=truncated,
    )
    breakdown = loss_breakdown(scores, end_token_id=end, sequence_length=length, vocab_size=vocab_size)
    return State(per_document, breakdown, longest=int(documents.lengths.max())), scores
