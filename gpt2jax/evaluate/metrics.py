"""Loss, accuracy, perplexity and bits per byte of a model on texts, from the loss of every single token.

The loss and hit of each scored token are fetched and kept (5 bytes a token; logits never leave the device), and every
figure is a sum over them in float64 in the order of the texts: no figure depends on how the rows were batched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt2jax.config import GPT2Config
from gpt2jax.data.batches import Batch, check_long_enough
from gpt2jax.data.documents import Documents, tokenize_documents
from gpt2jax.evaluate.windows import (
    Windows,
    check_windows,
    cut_documents,
    plan_windows,
    row_batches,
    study_batches,
)
from gpt2jax.language_model import LanguageModel
from gpt2jax.losses import token_losses
from gpt2jax.model import Params, head_kernel, hidden_states
from gpt2jax.precision import Precision, precision
from gpt2jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Settings:
    """How an evaluation was made.

    Attributes:
        sequence_length: T, tokens of one row.
        windows: "first", "disjoint" or "sliding" (see `gpt2jax.evaluate.windows`).
        stride: labels that a sliding window advances; T for the others.
        batch_size: rows of one batch.
        compute_dtype: of the matrix products.
    """

    sequence_length: int
    windows: str
    stride: int
    batch_size: int
    compute_dtype: str


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """What an evaluation found: the loss of every scored token, and figures made of it.

    A scored token is a label: the tokens of the texts, and the end token behind each text, in nats.

    Attributes:
        settings: how it was made.
        offsets: [n + 1] int64; the labels of document i are `offsets[i]:offsets[i + 1]` of the arrays below.
        labels: [tokens] int32 token ids.
        positions: [tokens] int32 place of each label in the row that scored it, 0 for the first.
        token_loss: [tokens] float32 in nats.
        token_hit: [tokens] bool, the most likely token was the label.
        token_bytes: [tokens] int32 length of each label as text, 0 for the end token; None without a tokenizer.
        keras_loss_sum, keras_hits, keras_positions: sums behind the study's figures.
        seconds: time of the evaluation on this machine, compilation included.
    """

    settings: Settings
    offsets: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    token_loss: np.ndarray
    token_hit: np.ndarray
    token_bytes: np.ndarray | None
    keras_loss_sum: float
    keras_hits: int
    keras_positions: int
    seconds: float

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.offsets) - 1

    @property
    def tokens(self) -> int:
        """Number of scored tokens, end tokens included."""
        return int(self.offsets[-1])

    @functools.cached_property
    def document_loss(self) -> np.ndarray:
        """[n] float64, sum of the loss over each document's tokens in nats."""
        return sum_by_document(self.token_loss, self.offsets)

    @functools.cached_property
    def document_hits(self) -> np.ndarray:
        """[n] float64, number of right predictions in each document."""
        return sum_by_document(self.token_hit, self.offsets)

    @property
    def document_tokens(self) -> np.ndarray:
        """[n] int64, number of scored tokens of each document."""
        return np.diff(self.offsets)

    @functools.cached_property
    def document_text_loss(self) -> np.ndarray | None:
        """[n] float64, the loss of those tokens that are text, without end tokens; None without a tokenizer."""
        if self.token_bytes is None:
            return None
        return sum_by_document(np.where(self.token_bytes > 0, self.token_loss, 0), self.offsets)

    @functools.cached_property
    def document_bytes(self) -> np.ndarray | None:
        """[n] float64, bytes of text that the scored tokens of each document stand for; None without a tokenizer."""
        return None if self.token_bytes is None else sum_by_document(self.token_bytes, self.offsets)

    @property
    def loss(self) -> float:
        """Mean cross-entropy per scored token in nats."""
        return float(self.document_loss.sum()) / self.tokens

    @property
    def accuracy(self) -> float:
        """Share of scored tokens that the model's most likely token was."""
        return float(self.document_hits.sum()) / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Bits that the model needs for a byte of the text it scored, whatever its tokenizer.

        The loss of the scored tokens that are text, over ln 2, over the bytes (UTF-8) that these tokens stand for. End
        tokens are left out of both: they have no bytes, and the one behind a document that was cut is not in the text.
        Text behind the cut is left out of both as well. None without a tokenizer or without text.
        """
        if self.document_text_loss is None or self.document_bytes is None or not self.document_bytes.sum():
            return None
        return float(self.document_text_loss.sum()) / math.log(2) / float(self.document_bytes.sum())

    @property
    def keras_loss(self) -> float:
        """The study's loss: loss of the first T - 1 tokens and an end token of each text, over documents * T.

        Padding counts in the denominator and not in the numerator.
        """
        return self.keras_loss_sum / self.keras_positions

    @property
    def keras_accuracy(self) -> float:
        """The study's accuracy: right predictions over documents * T; on padding, token 0 counts as right."""
        return self.keras_hits / self.keras_positions

    def loss_by_position(self) -> tuple[np.ndarray, np.ndarray]:
        """(loss sum [T] float64, tokens [T] float64) by the place of the token in its row."""
        length = self.settings.sequence_length
        sums = np.bincount(self.positions, weights=self.token_loss, minlength=length)
        return sums, np.bincount(self.positions, minlength=length).astype(np.float64)

    def as_dict(self, *, per_document: bool = False) -> dict[str, Any]:
        """The figures as plain numbers for JSON; one that is not finite is None.

        Args:
            per_document: lists of loss, tokens and hits of every document as well.
        """
        figures: dict[str, Any] = {
            "loss": finite(self.loss),
            "accuracy": self.accuracy,
            "keras_loss": finite(self.keras_loss),
            "keras_accuracy": self.keras_accuracy,
            "perplexity": finite(self.perplexity),
            "bits_per_byte": finite(self.bits_per_byte),
            "tokens": self.tokens,
            "documents": self.documents,
            "bytes": None if self.document_bytes is None else int(self.document_bytes.sum()),
            "keras_hits": self.keras_hits,
            "keras_positions": self.keras_positions,
            **dataclasses.asdict(self.settings),
        }
        if per_document:
            figures["document_loss"] = [finite(value) for value in self.document_loss.tolist()]
            figures["document_tokens"] = self.document_tokens.tolist()
            figures["document_hits"] = [int(value) for value in self.document_hits]
        return figures

    def __repr__(self) -> str:
        return (
            f"Evaluation(loss={self.loss:.4f}, accuracy={self.accuracy:.4f}, perplexity={self.perplexity:.2f}, "
            f"tokens={self.tokens}, documents={self.documents})"
        )


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

    The end token goes in front of each text and is the label behind it. An empty text counts with its end token.

    Args:
        model: a model, with adapters or without.
        texts: list of str, of lists of token ids, or a column of a `datasets.Dataset`.
        sequence_length: T, the most tokens a row holds.
        batch_size: B, rows at once. It changes time and memory, not the figures.
        windows: "first" (the first T - 1 tokens of each text, as in the study), "disjoint" or "sliding" (the whole of
            each text). The study's own two figures are of the first T - 1 tokens in any case.
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
    documents = _tokenize(model, list(texts))
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
    return Evaluation(
        settings=settings,
        offsets=rows.offsets,
        labels=labels,
        positions=rows.positions(),
        token_loss=found.loss,
        token_hit=found.hit,
        token_bytes=None if model.tokenizer is None else byte_lengths(model.tokenizer, model.config.vocab_size)[labels],
        keras_loss_sum=float(study.loss.sum(dtype=np.float64)),
        keras_hits=int(study.hit.sum()) + study.hits_on_padding,
        keras_positions=len(documents) * sequence_length,
        seconds=time.perf_counter() - began,
    )


def check_settings(
    model: LanguageModel, sequence_length: int, batch_size: int, windows: str, stride: int | None, compute_dtype: str
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


def _tokenize(model: LanguageModel, texts: Sequence[Any]) -> Documents:
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
    """The same items, each held back until the next is under way: the device works while the host collects."""
    held = next(results, None)
    for item in results:
        yield held
        held = item
    if held is not None:
        yield held


def sum_by_document(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """[tokens] -> [n] float64 sums; every document has at least one label."""
    return np.add.reduceat(values, offsets[:-1], dtype=np.float64)


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


def finite(value: float | None) -> float | None:
    """`value`, or None where it is not a finite number, which JSON cannot say."""
    return None if value is None or not math.isfinite(value) else float(value)


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
