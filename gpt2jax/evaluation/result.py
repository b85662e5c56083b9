"""What an evaluation found: sums by document, and the figures made of them."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np

from gpt2jax.evaluation.accumulators import CALIBRATION_BINS, Breakdown, DocumentSums, TokenScores
from gpt2jax.evaluation.token_classes import (
    FREQUENCY_CLASSES,
    frequency_classes,
    position_classes,
    sum_by_class,
)

SCHEMA = "gpt2jax.evaluation"
SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Settings:
    """How an evaluation was made.

    Attributes:
        sequence_length: T, tokens of one row.
        windows: "first", "disjoint", "sliding" or "rolling" (see `gpt2jax.evaluation.windows`).
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
    """What an evaluation found, and the figures made of it.

    A scored token is a label: the tokens of the texts, and (but with rolling windows) the end token behind each.

    Attributes:
        settings: how it was made.
        sums: sums by document.
        breakdown: sums by position, token id and confidence.
        has_text: there was a tokenizer, so that bytes, characters and words are known.
        data_sha256: hash of the texts, see `gpt2jax.comparison.provenance`.
        seconds: time of the evaluation on this machine, compilation included.
        per_token: the scores of every token, if they were asked for.
    """

    settings: Settings
    sums: DocumentSums
    breakdown: Breakdown
    has_text: bool
    data_sha256: str
    seconds: float
    per_token: TokenScores | None = None

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.sums)

    @property
    def documents_cut(self) -> int:
        """Texts of which tokens behind the first T - 1 were left out."""
        return int(self.sums.cut.sum())

    @property
    def tokens(self) -> int:
        """Number of scored tokens, end tokens included."""
        return int(self.sums.tokens.sum())

    @property
    def document_loss(self) -> np.ndarray:
        """[n] float64, sum of the loss over each document's tokens in nats."""
        return self.sums.loss

    @property
    def document_hits(self) -> np.ndarray:
        """[n] int64, number of right predictions in each document."""
        return self.sums.hits

    @property
    def document_tokens(self) -> np.ndarray:
        """[n] int64, number of scored tokens of each document."""
        return self.sums.tokens

    @property
    def document_text_loss(self) -> np.ndarray | None:
        """[n] float64, the loss of the tokens that are text, without end tokens; None without a tokenizer."""
        return self.sums.text_loss if self.has_text else None

    @property
    def document_bytes(self) -> np.ndarray | None:
        """[n] float64, bytes of text that the scored tokens stand for; None without a tokenizer."""
        return self.sums.bytes.astype(np.float64) if self.has_text else None

    @property
    def loss(self) -> float:
        """Mean cross-entropy per scored token in nats."""
        return float(self.sums.loss.sum()) / self.tokens

    @property
    def accuracy(self) -> float:
        """Share of scored tokens that the model's most likely token was."""
        return int(self.sums.hits.sum()) / self.tokens

    @property
    def accuracy_top5(self) -> float:
        """Share of scored tokens that were among the model's five most likely ones."""
        return int(self.sums.hits_top5.sum()) / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss): per token."""
        return _exp(self.loss)

    @property
    def word_perplexity(self) -> float | None:
        """exp of the loss per word of the text that was scored, whatever the tokenizer; see `bits_per_byte`."""
        loss = self._text_loss_over(self.sums.words)
        return None if loss is None else _exp(loss)

    @property
    def byte_perplexity(self) -> float | None:
        """exp of the loss per byte (UTF-8) of the text that was scored; see `bits_per_byte`."""
        loss = self._text_loss_over(self.sums.bytes)
        return None if loss is None else _exp(loss)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits that the model needs for a byte of the text it scored, whatever its tokenizer.

        The loss of the scored tokens that are text, over ln 2, over the bytes (UTF-8) that these tokens stand for.
        End tokens are left out of both: they have no bytes, and the one behind a document that was cut is not in the
        text. Text behind the cut is left out of both as well. None without a tokenizer or without text.
        """
        loss = self._text_loss_over(self.sums.bytes)
        return None if loss is None else loss / math.log(2)

    @property
    def bits_per_character(self) -> float | None:
        """The same for a character (code point) of the text."""
        loss = self._text_loss_over(self.sums.characters)
        return None if loss is None else loss / math.log(2)

    def _text_loss_over(self, sizes: np.ndarray) -> float | None:
        if not self.has_text or not sizes.sum():
            return None
        return float(self.sums.text_loss.sum()) / int(sizes.sum())

    @property
    def keras_positions(self) -> int:
        """Denominator of the study's figures: documents * T."""
        return self.documents * self.settings.sequence_length

    @property
    def keras_hits(self) -> int:
        """Numerator of the study's accuracy."""
        return int(self.sums.keras_hits.sum())

    @property
    def keras_loss(self) -> float:
        """The study's loss: loss of the first T - 1 tokens and an end token of each text, over documents * T.

        Padding counts in the denominator and not in the numerator.
        """
        return float(self.sums.keras_loss.sum()) / self.keras_positions

    @property
    def keras_accuracy(self) -> float:
        """The study's accuracy: right predictions over documents * T; on padding, token 0 counts as right."""
        return self.keras_hits / self.keras_positions

    @property
    def calibration_error(self) -> float:
        """Expected calibration error: how far confidence is from accuracy, over bins of confidence.

        The mean over tokens of |mean confidence - accuracy| of the token's bin, 15 bins of equal width.

        Source: Guo et al. 2017, "On Calibration of Modern Neural Networks".
        """
        gap = np.abs(self.breakdown.bin_confidence - self.breakdown.bin_hits)
        return float(gap.sum()) / self.tokens

    def calibration(self) -> list[dict[str, Any]]:
        """One dict a bin of confidence: low, high, tokens, confidence and accuracy (means; None if it is empty)."""
        bins = []
        for index, tokens in enumerate(self.breakdown.bin_tokens.tolist()):
            found = {
                "low": index / CALIBRATION_BINS,
                "high": (index + 1) / CALIBRATION_BINS,
                "tokens": int(tokens),
            }
            for name, sums in (("confidence", "bin_confidence"), ("accuracy", "bin_hits")):
                found[name] = float(getattr(self.breakdown, sums)[index]) / tokens if tokens else None
            bins.append(found)
        return bins

    def loss_by_position(self) -> tuple[np.ndarray, np.ndarray]:
        """(loss sum [T], tokens [T]), float64, by the place of the token in its row, without end tokens.

        End tokens behind texts that were cut are all at the last place, and would hide what context is worth
        there.
        """
        return self.breakdown.position_loss, self.breakdown.position_tokens

    def loss_by_range(self) -> list[dict[str, Any]]:
        """`loss_by_position` in ranges of places that double, one dict each: class, tokens, loss (mean, nats)."""
        classes, names = position_classes(self.settings.sequence_length)
        sums = (sum_by_class(values, classes, len(names)).tolist() for values in self.loss_by_position())
        return [
            {"class": name, "tokens": int(tokens), "loss": finite(loss / tokens) if tokens else None}
            for name, loss, tokens in zip(names, *sums, strict=True)
        ]

    def loss_by_frequency(self, token_counts: np.ndarray | None = None) -> list[dict[str, Any]]:
        """One dict a class of token ids, common ones first: class, tokens, loss (mean, nats), accuracy.

        Args:
            token_counts: [V] how often each id occurs in a text to count in. Default: in the scored tokens.
        """
        table = self.breakdown
        classes = frequency_classes(table.vocabulary_tokens if token_counts is None else token_counts)
        sums = [
            sum_by_class(values, classes, len(FREQUENCY_CLASSES))
            for values in (table.vocabulary_tokens, table.vocabulary_loss, table.vocabulary_hits)
        ]
        return [
            {
                "class": name,
                "tokens": int(tokens),
                "loss": finite(float(loss) / tokens) if tokens else None,
                "accuracy": float(hits) / tokens if tokens else None,
            }
            for name, tokens, loss, hits in zip(FREQUENCY_CLASSES, *map(np.ndarray.tolist, sums), strict=True)
        ]

    @functools.cached_property
    def recipe(self) -> str:
        """Which tokens were scored with which context, in a sentence: it belongs beside every figure."""
        settings = self.settings
        length = settings.sequence_length
        if settings.windows == "first":
            what = f"the first {length - 1} tokens of each text and an end token, after an end token"
        elif settings.windows == "disjoint":
            what = f"every token of each text and an end token, in rows of {length} side by side"
        elif settings.windows == "sliding":
            least = length - settings.stride
            what = (
                f"every token of each text and an end token once, with {least} to {length} tokens of context"
            )
        else:
            what = f"every token of each text, without an end token behind it, in rolling windows of {length}"
        texts = "text" if self.documents == 1 else "texts"
        return (
            f"{what}; {self.documents:,} {texts}, {self.tokens:,} tokens, means per token over all texts, "
            f"matrix products in {settings.compute_dtype}"
        )

    def as_dict(self, *, per_document: bool = False) -> dict[str, Any]:
        """The figures as plain numbers for JSON; one that is not finite is None.

        Args:
            per_document: lists of loss, tokens and hits of every document as well.
        """
        sums, text = self.sums, self.has_text
        figures: dict[str, Any] = {
            "loss": finite(self.loss),
            "accuracy": self.accuracy,
            "accuracy_top5": self.accuracy_top5,
            "keras_loss": finite(self.keras_loss),
            "keras_accuracy": self.keras_accuracy,
            "perplexity": finite(self.perplexity),
            "word_perplexity": finite(self.word_perplexity),
            "byte_perplexity": finite(self.byte_perplexity),
            "bits_per_byte": finite(self.bits_per_byte),
            "bits_per_character": finite(self.bits_per_character),
            "calibration_error": finite(self.calibration_error),
            "tokens": self.tokens,
            "documents": self.documents,
            "documents_cut": self.documents_cut,
            "bytes": int(sums.bytes.sum()) if text else None,
            "characters": int(sums.characters.sum()) if text else None,
            "words": int(sums.words.sum()) if text else None,
            "loss_sum": finite(float(sums.loss.sum())),
            "text_loss_sum": finite(float(sums.text_loss.sum())) if text else None,
            "hits": int(sums.hits.sum()),
            "hits_top5": int(sums.hits_top5.sum()),
            "keras_hits": self.keras_hits,
            "keras_positions": self.keras_positions,
            **dataclasses.asdict(self.settings),
            "recipe": self.recipe,
            "calibration": self.calibration(),
            "loss_by_position": self.loss_by_range(),
            "loss_by_frequency": self.loss_by_frequency(),
        }
        if per_document:
            figures["document_loss"] = [finite(value) for value in sums.loss.tolist()]
            figures["document_tokens"] = sums.tokens.tolist()
            figures["document_hits"] = sums.hits.tolist()
        return figures

    def __repr__(self) -> str:
        return (
            f"Evaluation(loss={self.loss:.4f}, accuracy={self.accuracy:.4f}, "
            f"perplexity={self.perplexity:.2f}, tokens={self.tokens}, documents={self.documents})"
        )


def _exp(loss: float) -> float:
    return math.inf if loss >= 700 else math.exp(loss)


def finite(value: float | None) -> float | None:
    """`value`, or None where it is not a finite number, which JSON cannot say."""
    return None if value is None or not math.isfinite(value) else float(value)
