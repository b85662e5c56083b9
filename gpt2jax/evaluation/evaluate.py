"""Loss, accuracy, perplexity and bits per byte of a model on texts, from the loss of every single token.

The texts are read, scored and summed up piece by piece: memory does not grow with their number but for a few sums a
document. Every figure is a sum over documents in float64 in the order of the texts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gpt2jax.data.batches import check_long_enough
from gpt2jax.data.documents import Documents
from gpt2jax.data.tokenization import tokenize_documents
from gpt2jax.evaluation.accumulators import (
    Breakdown,
    DocumentSums,
    TokenScores,
    break_down,
    sum_by_document,
    text_sums,
)
from gpt2jax.evaluation.result import Evaluation, Settings
from gpt2jax.evaluation.resume import State, read_state, write_state
from gpt2jax.evaluation.scoring import Score, score_windows, scorer
from gpt2jax.evaluation.windows import (
    check_windows,
    cut_documents,
    encode_beginnings,
    plan_rolling_windows,
    plan_windows,
)
from gpt2jax.language_model import LanguageModel
from gpt2jax.ops.precision import Precision
from gpt2jax.utils.fingerprint import add_text, params_fingerprint
from gpt2jax.utils.progress import evaluation_progress
from gpt2jax.utils.validation import check_count, check_model, check_path, check_texts

# documents that are read, scored and summed up at once
PIECE = 1024


def evaluate(
    model: LanguageModel,
    texts: Iterable[Any],
    *,
    sequence_length: int = 128,
    batch_size: int = 32,
    windows: str = "first",
    stride: int | None = None,
    compute_dtype: str = "float32",
    devices: Sequence[Any] | None = None,
    per_token: bool = False,
    state: str | pathlib.Path | None = None,
    resume: bool = False,
    progress: bool = False,
) -> Evaluation:
    """Loss and accuracy of a model on texts.

    The end token goes in front of each text and is the label behind it. An empty text counts with its end token.

    Args:
        model: a model, with adapters or without.
        texts: str, lists of token ids, or a column of a `datasets.Dataset`; a list, or an iterator that reads as it
            goes: no more than `PIECE` texts are held at once.
        sequence_length: T, the most tokens a row holds.
        batch_size: B, rows at once. It changes time and memory, not the figures.
        windows: "first" (the first T - 1 tokens of each text, as in the study), "disjoint", "sliding" (the whole of
            each text) or "rolling" (the whole, as lm-evaluation-harness counts it: no end token is scored). The
            study's own two figures are of the first T - 1 tokens in any case.
        stride: with "sliding", labels each row advances; T - stride is the least context. Default T // 2.
        compute_dtype: "float32", "bfloat16" or "float16", of the matrix products.
        devices: jax devices that share each batch's rows. Default: all of this process.
        per_token: keep the scores of every token as well, 20 bytes each.
        state: file to keep what has been found so far, replaced after each `PIECE` texts.
        resume: go on from there. The texts must be the same; those that are done are read and not scored again.
        progress: show a progress bar.

    Returns:
        An `Evaluation`.

    Raises:
        ValueError: there are no texts, none has two tokens, a setting is out of range, or the state belongs to
            another evaluation.
        TypeError: `texts` is one string, or no list.
    """
    began = time.perf_counter()
    settings = check_settings(model, sequence_length, batch_size, windows, stride, compute_dtype)
    check_texts("texts", texts)
    iterator = iter(texts)
    if state is not None and per_token:
        raise ValueError("per_token=True: a state file holds sums and no tokens; leave out one of them")
    if resume and state is None:
        raise ValueError("resume=True needs the state file to resume from")
    path = None if state is None else check_path("state", state)
    identity = {} if path is None else _identity(model, settings)
    found = read_state(path, identity) if path is not None and resume else State()
    digest = hashlib.sha256()
    _skip_done(iterator, found, digest)
    earlier, scores = found.seconds, []
    score, count = scorer(model, compute_dtype, devices)
    size = len(texts) if hasattr(texts, "__len__") else None  # type: ignore[arg-type]
    with evaluation_progress(size, found.documents, progress) as advance:
        while piece := list(itertools.islice(iterator, PIECE)):
            try:
                part, breakdown, tokens, longest = _score_piece(model, piece, settings, score, count, advance)
            except ValueError as error:
                if found.documents:  # a text is named by its place in the piece
                    raise ValueError(f"counted from text {found.documents}: {error}") from error
                raise
            for text in piece:
                add_text(digest, text)
            seconds = earlier + time.perf_counter() - began
            found = found.with_piece(part, breakdown, digest.hexdigest(), longest, seconds)
            if path is not None:
                write_state(path, found, identity)
            if per_token:
                scores.append(tokens)
    if found.sums is None or found.breakdown is None:
        raise ValueError("there are no texts: the data set is empty")
    if found.longest < 2:
        check_long_enough(Documents(np.empty(0), np.zeros(found.documents + 1, np.int64)))
    return Evaluation(
        settings,
        found.sums,
        found.breakdown,
        has_text=model.tokenizer is not None,
        data_sha256=digest.hexdigest(),
        seconds=earlier + time.perf_counter() - began,
        per_token=TokenScores.join(scores) if per_token else None,
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
    check_model("model", model)
    for name, value, least in (("sequence_length", sequence_length, 2), ("batch_size", batch_size, 1)):
        check_count(name, value, least)
    context = model.config.n_positions
    if sequence_length > context:
        raise ValueError(f"sequence_length={sequence_length} is over the model's context of {context} tokens")
    Precision.for_backend(compute_dtype)
    stride = check_windows(windows, sequence_length, stride)
    return Settings(int(sequence_length), windows, int(stride), int(batch_size), compute_dtype)


def check_scorable(model: LanguageModel, texts: Sequence[Any]) -> None:
    """Raises ValueError where no text has two tokens; reads no further than the first that has."""
    for text in texts:
        beginning = text[:1000] if isinstance(text, str) else text
        if len(_tokenize(model, [beginning])[0]) >= 2:
            return
    check_long_enough(_tokenize(model, texts))


def _identity(model: LanguageModel, settings: Settings) -> dict[str, Any]:
    """What a state file belongs to."""
    model_hash = params_fingerprint((model.params, model.adapters))
    return dataclasses.asdict(settings) | {"piece": PIECE, "model": model_hash}


def _skip_done(texts: Iterator[Any], found: State, digest: Any) -> None:
    """Moves on to the first text that is not done, or ValueError where those before are not the same."""
    skipped = 0
    for text in itertools.islice(texts, found.documents):
        add_text(digest, text)
        skipped += 1
    if found.documents and (skipped < found.documents or digest.hexdigest() != found.data_sha256):
        raise ValueError(
            f"the state is of {found.documents:,} other texts than the first {skipped:,} here: do not resume from it"
        )


def _tokenize(model: LanguageModel, texts: Sequence[Any], first: int | None = None) -> Documents:
    """The texts as documents, of which the first `first` tokens are wanted, or all."""
    for index, text in enumerate(texts):
        if isinstance(text, Mapping):
            raise ValueError(
                f"text {index} has the columns {', '.join(map(repr, text))}: pass one column of them, not all"
            )
    if first is not None and model.tokenizer is not None:
        strings = [index for index, text in enumerate(texts) if isinstance(text, str)]
        beginnings = encode_beginnings(model.tokenizer, [texts[index] for index in strings], first)
        texts = list(texts)
        for index, ids in zip(strings, beginnings, strict=True):
            texts[index] = ids
    return tokenize_documents(texts, model.tokenizer, vocab_size=model.config.vocab_size)


def _score_piece(
    model: LanguageModel,
    texts: Sequence[Any],
    settings: Settings,
    score: Score,
    devices: int,
    advance: Callable[[float], None],
) -> tuple[DocumentSums, Breakdown, TokenScores, int]:
    """Sums and scores of some texts, and the number of tokens of the longest."""
    length, end = settings.sequence_length, model.end_token_id
    # the study's windows need the beginnings only, and reading whole articles takes longer than scoring them
    documents = _tokenize(model, texts, first=length if settings.windows == "first" else None)
    first = cut_documents(documents, length - 1)
    plans = [(first, plan_windows(first, length, length))]
    if settings.windows == "rolling":
        plans.append((documents, plan_rolling_windows(documents, length)))
    elif settings.windows != "first":
        plans.append((documents, plan_windows(documents, length, settings.stride)))
    share = len(texts) / sum(len(windows) for _, windows in plans)
    passes = [
        score_windows(
            score,
            *plan,
            sequence_length=length,
            batch_size=settings.batch_size,
            devices=devices,
            end_token_id=end,
            study=index == 0,
            advance=lambda rows: advance(share * rows),
        )
        for index, plan in enumerate(plans)
    ]
    (study, on_padding), (scores, _) = passes[0], passes[-1]
    vocab_size = model.config.vocab_size
    sums = DocumentSums(
        tokens=np.diff(scores.offsets),
        loss=sum_by_document(scores.loss, scores.offsets),
        hits=sum_by_document(scores.rank == 0, scores.offsets, np.int64),
        hits_top5=sum_by_document(scores.rank < 5, scores.offsets, np.int64),
        **text_sums(scores, model.tokenizer, vocab_size),
        keras_loss=sum_by_document(study.loss, study.offsets),
        keras_hits=sum_by_document(study.rank == 0, study.offsets, np.int64) + on_padding,
        cut=documents.lengths > plans[-1][0].lengths,
    )
    breakdown = break_down(scores, end_token_id=end, sequence_length=length, vocab_size=vocab_size)
    return sums, breakdown, scores, int(documents.lengths.max())
