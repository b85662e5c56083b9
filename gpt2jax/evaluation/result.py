"""The result of an evaluation: sums by document, and the figures computed from them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from gpt2jax.evaluation.accumulators import CALIBRATION_BINS, Breakdown, DocumentSums, TokenScores
from gpt2jax.evaluation.config import EvaluationConfig
from gpt2jax.evaluation.keras_metrics import KerasMetrics
from gpt2jax.evaluation.token_classes import (
    FREQUENCY_CLASSES,
    frequency_classes,
    position_classes,
    sum_by_class,
)
from gpt2jax.utils.notices import count_noun

SCHEMA = "gpt2jax.evaluation"
SCHEMA_VERSION = 2  # 1 had hits, documents_cut and recipe


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """The sums of an evaluation, and the figures computed from them.

    A scored token is a label: the tokens of the texts, and the end token behind each text unless the windows are
    "rolling".

    Attributes:
        config: settings, with all defaults filled in.
        per_document: sums over each document.
        breakdown: sums by position, token id and confidence.
        has_text: there was a tokenizer, so that bytes, characters and words are known.
        data_sha256: `data_fingerprint` of the texts.
        seconds: time of the evaluation on this machine, compilation included.
        per_token: the scores of every token, if asked for.
    """

    config: EvaluationConfig
    per_document: DocumentSums
    breakdown: Breakdown
    has_text: bool
    data_sha256: str
    seconds: float
    per_token: TokenScores | None = None

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.per_document)

    @property
    def num_truncated(self) -> int:
        """Number of texts with tokens behind the first T - 1, which were left out."""
        return int(self.per_document.truncated.sum())

    @property
    def tokens(self) -> int:
        """Number of scored tokens, end tokens included."""
        return int(self.per_document.tokens.sum())

    @property
    def loss(self) -> float:
        """Mean cross-entropy per scored token in nats."""
        return float(self.per_document.loss.sum()) / self.tokens

    @property
    def accuracy(self) -> float:
        """Fraction of scored tokens that were the model's most likely token."""
        return int(self.per_document.correct.sum()) / self.tokens

    @property
    def accuracy_top5(self) -> float:
        """Fraction of scored tokens that were among the model's five most likely tokens."""
        return int(self.per_document.correct_top5.sum()) / self.tokens

    @property
    def perplexity(self) -> float:
        """exp of the loss per token."""
        return _exp(self.loss)

    @property
    def word_perplexity(self) -> float | None:
        """exp of the loss per word of the scored text, see `bits_per_byte`."""
        loss = self._text_loss_over(self.per_document.words)
        return None if loss is None else _exp(loss)

    @property
    def byte_perplexity(self) -> float | None:
        """exp of the loss per byte (UTF-8) of the scored text, see `bits_per_byte`."""
        loss = self._text_loss_over(self.per_document.bytes)
        return None if loss is None else _exp(loss)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits that the model needs for a byte (UTF-8) of the scored text; comparable between tokenizers.

        The loss of the scored tokens that are text, over ln 2, over the bytes that these tokens stand for. End tokens
        have no bytes and are left out of both, and so is text that was truncated. None without a tokenizer or without
        text.
        """
        loss = self._text_loss_over(self.per_document.bytes)
        return None if loss is None else loss / math.log(2)

    @property
    def bits_per_character(self) -> float | None:
        """Bits that the model needs for a character (code point) of the scored text, see `bits_per_byte`."""
        loss = self._text_loss_over(self.per_document.characters)
        return None if loss is None else loss / math.log(2)

    def _text_loss_over(self, sizes: np.ndarray) -> float | None:
        if not self.has_text or not sizes.sum():
            return None
        return float(self.per_document.text_loss.sum()) / int(sizes.sum())

    @property
    def keras(self) -> KerasMetrics | None:
        """The figures that Keras reports; None unless the windows are "truncate", see `keras_metrics`."""
        if self.config.windows != "truncate":
            return None
        sums, positions = self.per_document, self.documents * self.config.length
        correct = int(sums.correct.sum() + sums.correct_on_padding.sum())
        return KerasMetrics(float(sums.loss.sum()) / positions, correct, positions)

    @property
    def keras_loss(self) -> float | None:
        """Loss as Keras reports it, see `keras`."""
        return None if self.keras is None else self.keras.loss

    @property
    def keras_accuracy(self) -> float | None:
        """Accuracy as Keras reports it, see `keras`."""
        return None if self.keras is None else self.keras.accuracy

    @property
    def calibration_error(self) -> float:
        """Expected calibration error: the mean over tokens of |mean confidence - accuracy| of the token's bin.

        15 bins of equal width, by the probability of the most likely token.

        Source: Guo et al. 2017, "On Calibration of Modern Neural Networks".
        """
        gap = np.abs(self.breakdown.bin_confidence - self.breakdown.bin_correct)
        return float(gap.sum()) / self.tokens

    def calibration(self) -> list[dict[str, Any]]:
        """Return one dict a bin of confidence: low, high, tokens, confidence and accuracy (means; None if empty)."""
        bins = []
        for index, tokens in enumerate(self.breakdown.bin_tokens.tolist()):
            found = {
                "low": index / CALIBRATION_BINS,
                "high": (index + 1) / CALIBRATION_BINS,
                "tokens": int(tokens),
            }
            for name, sums in (("confidence", "bin_confidence"), ("accuracy", "bin_correct")):
                found[name] = float(getattr(self.breakdown, sums)[index]) / tokens if tokens else None
            bins.append(found)
        return bins

    def loss_by_position(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the sum of the loss and the number of tokens by place in the row, [T] float64 each.

        The final end tokens are left out: those of truncated texts are all at the last place.
        """
        return self.breakdown.position_loss, self.breakdown.position_tokens

    def loss_by_range(self) -> list[dict[str, Any]]:
        """Return one dict a range of places, which double: class, tokens, loss (mean, nats)."""
        classes, names = position_classes(self.config.length)
        sums = (sum_by_class(values, classes, len(names)).tolist() for values in self.loss_by_position())
        return [
            {"class": name, "tokens": int(tokens), "loss": finite(loss / tokens) if tokens else None}
            for name, loss, tokens in zip(names, *sums, strict=True)
        ]

    def loss_by_frequency(self, token_counts: np.ndarray | None = None) -> list[dict[str, Any]]:
        """Return one dict a class of token ids, common ones first: class, tokens, loss (mean, nats), accuracy.

        Args:
            token_counts: [V] number of occurrences of each id. Default: in the scored tokens.
        """
        table = self.breakdown
        classes = frequency_classes(table.vocabulary_tokens if token_counts is None else token_counts)
        sums = [
            sum_by_class(values, classes, len(FREQUENCY_CLASSES))
            for values in (table.vocabulary_tokens, table.vocabulary_loss, table.vocabulary_correct)
        ]
        return [
            {
                "class": name,
                "tokens": int(tokens),
                "loss": finite(float(loss) / tokens) if tokens else None,
                "accuracy": float(correct) / tokens if tokens else None,
            }
            for name, tokens, loss, correct in zip(
                FREQUENCY_CLASSES, *map(np.ndarray.tolist, sums), strict=True
            )
        ]

    @property
    def description(self) -> str:
        """Which tokens were scored with which context, in a sentence for every report."""
        config, length = self.config, self.config.length
        if config.windows == "truncate":
            what = f"the first {length - 1} tokens of each text and an end token, after an end token"
        elif config.windows == "non_overlapping":
            what = f"every token of each text and an end token, in rows of {length} side by side"
        elif config.windows == "sliding":
            context = f"{length - (config.stride or 0)} to {length} tokens of context"
            what = f"every token of each text and an end token once, with {context}"
        else:
            what = f"every token of each text, without an end token behind it, in rolling windows of {length}"
        return (
            f"{what}; {count_noun(self.documents, 'text')}, {self.tokens:,} tokens, means per token over all texts, "
            f"matrix products in {config.compute_dtype}"
        )

    def as_dict(self, *, per_document: bool = False) -> dict[str, Any]:
        """Return the figures as plain values for JSON; None for those that are not finite.

        Args:
            per_document: add lists of loss, tokens and correct predictions of every document.
        """
        sums, keras, text = self.per_document, self.keras, self.has_text
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
            "num_truncated": self.num_truncated,
            "bytes": int(sums.bytes.sum()) if text else None,
            "characters": int(sums.characters.sum()) if text else None,
            "words": int(sums.words.sum()) if text else None,
            "loss_sum": finite(float(sums.loss.sum())),
            "text_loss_sum": finite(float(sums.text_loss.sum())) if text else None,
            "correct": int(sums.correct.sum()),
            "correct_top5": int(sums.correct_top5.sum()),
            "keras_correct": None if keras is None else keras.correct,
            "keras_positions": None if keras is None else keras.positions,
            **dataclasses.asdict(self.config),
            "description": self.description,
            "calibration": self.calibration(),
            "loss_by_position": self.loss_by_range(),
            "loss_by_frequency": self.loss_by_frequency(),
        }
        if per_document:
            figures["document_loss"] = [finite(value) for value in sums.loss.tolist()]
            figures["document_tokens"] = sums.tokens.tolist()
            figures["document_correct"] = sums.correct.tolist()
        return figures

    def __repr__(self) -> str:
        return (
            f"Evaluation(loss={self.loss:.4f}, accuracy={self.accuracy:.4f}, "
            f"perplexity={self.perplexity:.2f}, tokens={self.tokens}, documents={self.documents})"
        )

    def _repr_html_(self) -> str:
        from gpt2jax.report.notebook import evaluation_html

        return evaluation_html(self)


def _exp(loss: float) -> float:
    return math.inf if loss >= 700 else math.exp(loss)


def finite(value: float | None) -> float | None:
    """Return `value`, or None for nan and infinity, which JSON does not have."""
    return None if value is None or not math.isfinite(value) else float(value)


def finite_values(tree: Any) -> Any:
    """Return plain values, nested in dicts and lists, with None for numbers that are not finite."""
    if isinstance(tree, dict):
        return {name: finite_values(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [finite_values(value) for value in tree]
    return finite(tree) if isinstance(tree, float) else tree
