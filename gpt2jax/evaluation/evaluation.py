"""What an evaluation found: the loss of every scored token, and the figures made of it."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Settings:
    """How an evaluation was made.

    Attributes:
        sequence_length: T, tokens of one row.
        windows: "first", "disjoint" or "sliding" (see `gpt2jax.evaluation.windows`).
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
        token_bytes: [tokens] int32 length of each label as text, 0 for the end token; None without a
            tokenizer.
        documents_cut: texts of which tokens behind the first T - 1 were left out.
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
    documents_cut: int
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
        """[n] float64, the loss of the tokens that are text, without end tokens; None without a tokenizer."""
        if self.token_bytes is None:
            return None
        return sum_by_document(np.where(self.token_bytes > 0, self.token_loss, 0), self.offsets)

    @functools.cached_property
    def document_bytes(self) -> np.ndarray | None:
        """[n] float64, bytes of text that the scored tokens stand for; None without a tokenizer."""
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

        The loss of the scored tokens that are text, over ln 2, over the bytes (UTF-8) that these tokens stand
        for. End
        tokens are left out of both: they have no bytes, and the one behind a document that was cut is not in
            the text.
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
        """(loss sum [T], tokens [T]), float64, by the place of the token in its row, without end tokens.

        End tokens behind texts that were cut are all at the last place, and would hide what context is worth
        there.
        """
        length = self.settings.sequence_length
        text = np.ones(self.tokens, bool)
        text[self.offsets[1:] - 1] = False
        sums = np.bincount(self.positions[text], weights=self.token_loss[text], minlength=length)
        return sums, np.bincount(self.positions[text], minlength=length).astype(np.float64)

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
            "documents_cut": self.documents_cut,
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
            f"Evaluation(loss={self.loss:.4f}, accuracy={self.accuracy:.4f}, "
            f"perplexity={self.perplexity:.2f}, tokens={self.tokens}, documents={self.documents})"
        )


def sum_by_document(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """[tokens] -> [n] float64 sums; every document has at least one label."""
    return np.add.reduceat(values, offsets[:-1], dtype=np.float64)


def finite(value: float | None) -> float | None:
    """`value`, or None where it is not a finite number, which JSON cannot say."""
    return None if value is None or not math.isfinite(value) else float(value)
