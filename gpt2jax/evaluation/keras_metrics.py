"""The loss and accuracy that Keras reports for a GPT-2 with its defaults (keras-nlp up to 0.8).

Keras makes one row of T tokens of each text: [end] + tokens + [end], truncated and padded with token 0, of which the
inputs are all but the last and the targets all but the first. Both figures are means over all places of all rows,
documents * T of them. The loss is 0 on padding. The accuracy counts predictions on padding as well, and token 0 is
correct there. So the end token behind a short text is an input too: no loss is asked there, but what the model
predicts on the padding behind it counts in the accuracy.

Source: keras-nlp 0.7, `GPT2CausalLMPreprocessor` and `SparseCategoricalAccuracy` without sample weights.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from gpt2jax.data.documents import Documents
from gpt2jax.evaluation.accumulators import TokenScores, sum_by_document
from gpt2jax.evaluation.config import EvaluationConfig
from gpt2jax.evaluation.scoring import Scorer, empty_scores, fill_scores, score_batches
from gpt2jax.evaluation.texts import CHUNK_SIZE, tokenize_chunk
from gpt2jax.evaluation.windows import (
    Batch,
    Windows,
    bucketed_batch_size,
    plan_windows,
    stack_rows,
    truncate_documents,
    window_row,
)
from gpt2jax.language_model import LanguageModel
from gpt2jax.utils.jax_switches import default_switches
from gpt2jax.utils.validation import check_model, check_texts


@dataclasses.dataclass(frozen=True)
class KerasMetrics:
    """The two figures of Keras, and the counts behind the accuracy.

    Attributes:
        loss: sum of the loss over documents * T, in nats.
        correct: number of correct predictions, those on padding included.
        positions: documents * T.
    """

    loss: float
    correct: int
    positions: int

    @property
    def accuracy(self) -> float:
        """Return the fraction of correct predictions."""
        return self.correct / self.positions


@default_switches()
def keras_metrics(
    model: LanguageModel,
    texts: Iterable[Any],
    *,
    sequence_length: int | None = None,
    batch_size: int = 32,
    compute_dtype: str = "float32",
) -> KerasMetrics:
    """Compute the figures of Keras alone, whatever windows an evaluation has; runs the model over the texts.

    `evaluate` with windows="truncate", its default, gives the same figures without another pass of the model.

    Args:
        model: as for `evaluate`.
        texts: as for `evaluate`.
        sequence_length: see `EvaluationConfig`.
        batch_size: see `EvaluationConfig`.
        compute_dtype: see `EvaluationConfig`.

    Raises:
        ValueError: there are no texts, or a setting is not legal.
    """
    check_model("model", model)
    settings: dict[str, Any] = {"batch_size": batch_size, "compute_dtype": compute_dtype}
    config = EvaluationConfig(sequence_length, **settings).resolve(model.config.n_positions)
    check_texts("texts", texts)
    scorer, iterator = Scorer(model, config.compute_dtype), iter(texts)
    losses, correct = [np.empty(0)], 0
    while chunk := list(itertools.islice(iterator, CHUNK_SIZE)):
        found = truncate_documents(tokenize_chunk(model, chunk, config), config.length - 1)
        scores, correct_on_padding = score_keras_rows(scorer, found, config, model.end_token_id)
        losses.append(sum_by_document(scores.loss, scores.offsets))
        correct += int((scores.rank == 0).sum() + correct_on_padding.sum())
    loss = np.concatenate(losses)
    if not len(loss):
        raise ValueError("there are no texts: the data set is empty")
    positions = len(loss) * config.length
    return KerasMetrics(float(loss.sum()) / positions, correct, positions)


def score_keras_rows(
    scorer: Scorer,
    documents: Documents,
    config: EvaluationConfig,
    end_token_id: int,
    advance: Callable[[int], None] | None = None,
) -> tuple[TokenScores, np.ndarray]:
    """Score documents of at most T - 1 tokens in the rows that Keras makes of them.

    Returns:
        The scores of the documents' labels, and the correct predictions on each row's padding, [n] int64.
    """
    windows = plan_windows(documents, config.length, config.length)
    scores = empty_scores(documents, windows, end_token_id)
    correct_on_padding = np.zeros(len(documents), np.int64)
    size = bucketed_batch_size(len(documents), config.batch_size, scorer.num_devices)
    batches = _keras_batches(documents, windows, config.length, size, end_token_id)
    for chosen, results in score_batches(scorer, batches):
        fill_scores(scores, windows, chosen, results)
        correct = results[1][: len(chosen)] == 0
        is_padding = np.arange(config.length) >= windows.widths[chosen, None]
        correct_on_padding[chosen] = (correct & is_padding).sum(axis=1)
        if advance is not None:
            advance(len(chosen))
    return scores, correct_on_padding


def _keras_batches(
    documents: Documents, windows: Windows, sequence_length: int, batch_size: int, end_token_id: int
) -> Iterator[tuple[np.ndarray, Batch]]:
    """Yield Keras' rows in the order of the documents: (row indices [at most B], batch [B, T])."""
    for start in range(0, len(documents), batch_size):
        chosen = np.arange(start, min(start + batch_size, len(documents)))
        rows = [keras_row(documents, windows, int(index), sequence_length, end_token_id) for index in chosen]
        yield chosen, stack_rows(rows, batch_size)


def keras_row(
    documents: Documents, windows: Windows, index: int, sequence_length: int, end_token_id: int
) -> Batch:
    """Return Keras' row of a document: `window_row`, and the keys that attention may see as `attention_mask` [T]."""
    row = window_row(documents, windows, index, sequence_length, end_token_id)
    width = int(windows.widths[index])  # the document's tokens and one more
    row["tokens"][width : width + 1] = end_token_id
    row["attention_mask"] = np.arange(sequence_length) <= width
    return row
