"""Scores of every token of a batch, computed on the device: loss, rank of the label, confidence.

Logits never leave the device, and are never there for a whole batch: the head runs over chunks of rows. The
weights are laid out once for an evaluation: kernels in the compute dtype, the head as it streams fastest.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gpt2jax.config import GPT2Config
from gpt2jax.data.batches import Batch
from gpt2jax.data.documents import Documents
from gpt2jax.evaluation.sums import TokenScores
from gpt2jax.evaluation.windows import Windows, bucketed_batch_size, row_batches, study_batches
from gpt2jax.language_model import LanguageModel
from gpt2jax.model import Params, head_kernel, hidden_states
from gpt2jax.precision import Precision, matmul, precision

# the most logits held at once on each device: 8 Mi float32 values are 32 MiB
MAX_LOGITS = 1 << 23

# (tokens, targets, mask) -> (loss, rank, confidence), each [B, T]
Score = Callable[[np.ndarray, np.ndarray, np.ndarray | None], tuple[jax.Array, jax.Array, jax.Array]]


def scorer(
    model: LanguageModel, compute_dtype: str, devices: Sequence[Any] | None = None
) -> tuple[Score, int]:
    """A function that scores batches with a model, and the number of devices that share each batch.

    Args:
        model: with adapters or without.
        compute_dtype: operands of the matrix products.
        devices: to spread the rows of a batch over, each with a copy of the parameters. Default: all of this
            process.
    """
    numerics = precision(compute_dtype)
    devices = jax.local_devices() if devices is None else list(devices)
    mesh = jax.sharding.Mesh(np.array(devices), ("devices",))
    params = _scoring_params(model.merge_adapter().params, numerics.compute_dtype)
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))

    def score(tokens, targets, mask):
        # [devices, rows of each, T]: with an axis of their own, nothing that follows mixes rows of two devices
        batch = [x.reshape(len(devices), -1, x.shape[-1]) for x in (tokens, targets, mask) if x is not None]
        batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("devices")))
        return _token_scores(params, *batch, config=model.config, numerics=numerics)

    return score, len(devices)


@functools.partial(jax.jit, static_argnums=1)
def _scoring_params(params: Params, dtype: jnp.dtype) -> Params:
    """Kernels in the compute dtype, and the head apart from the embedding: [V, D] in the compute dtype."""

    def cast(path, x):
        return x.astype(dtype) if path[-1].key == "kernel" else x

    body = {name: leaf for name, leaf in params.items() if name != "lm_head"}
    return {
        "body": jax.tree_util.tree_map_with_path(cast, body),
        "head": head_kernel(params).astype(dtype),
    }


@functools.partial(jax.jit, static_argnames=("config", "numerics"))
def _token_scores(params, tokens, targets, mask=None, *, config: GPT2Config, numerics: Precision):
    def scores(tokens, targets, mask):
        # positions run on over padding, as in Keras; padding is on the right, so no other figure depends on it
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden = hidden_states(
            params["body"], config, tokens, positions=positions, attention_mask=mask, precision=numerics
        )
        return head_scores(hidden, params["head"], targets, numerics)

    if tokens.shape[0] == 1:
        return scores(tokens[0], targets[0], None if mask is None else mask[0])
    found = jax.vmap(scores, in_axes=(0, 0, None if mask is None else 0))(tokens, targets, mask)
    return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), found)


def head_scores(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, numerics: Precision
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scores of the label at every position.

    Args:
        hidden: [B, T, D] after the last LayerNorm.
        head: [V, D].
        targets: [B, T] int.
        numerics: dtypes of the product; softmax and loss are float32.

    Returns:
        (loss float32 in nats, rank int32: tokens before the label when sorted by logit, equal ones by id; confidence
        float32: largest probability), each [B, T].
    """
    vocab_size = head.shape[0]

    def chunk(rows: tuple[jax.Array, jax.Array]):
        logits = matmul(rows[0], head.T, numerics.compute_dtype)
        label = rows[1][:, None]
        own = jnp.take_along_axis(logits, label, axis=-1)
        top = logits.max(axis=-1, keepdims=True)
        log_z = jnp.log(jnp.exp(logits - top).sum(axis=-1)) + top[:, 0]
        # not "greater": a logit that is no number is never a hit
        ahead = ~(logits < own) & ((logits != own) | (jnp.arange(vocab_size) < label))
        return log_z - own[:, 0], ahead.sum(axis=-1, dtype=jnp.int32), jnp.exp(top[:, 0] - log_z)

    count = targets.size
    chunks = math.ceil(count * vocab_size / MAX_LOGITS)
    size = min(count, 8 * math.ceil(count / (8 * chunks)))  # narrow products like a multiple of 8 rows
    chunks = math.ceil(count / size)
    flat = (hidden.reshape(count, -1), targets.reshape(count))

    def cut(x):
        filled = jnp.pad(x, [(0, chunks * size - count)] + [(0, 0)] * (x.ndim - 1))
        return filled.reshape(chunks, size, *x.shape[1:])

    if chunks == 1:
        found = chunk(flat)
    else:
        found = jax.lax.map(chunk, jax.tree.map(cut, flat))
    return tuple(x.reshape(-1)[:count].reshape(targets.shape) for x in found)  # type: ignore[return-value]


def score_windows(
    score: Score,
    documents: Documents,
    windows: Windows,
    *,
    sequence_length: int,
    batch_size: int,
    devices: int,
    end_token_id: int,
    study: bool,
    advance: Callable[[int], None],
) -> tuple[TokenScores, np.ndarray]:
    """Scores of all labels of documents.

    Args:
        score, devices: from `scorer`.
        documents, windows: what to run; its labels end with an end token unless the windows are rolling.
        sequence_length, batch_size: T, B.
        end_token_id: goes in front of each document.
        study: rows as the study had them, which is what its accuracy counts.
        advance: called with the number of rows done.

    Returns:
        The scores, and [n] int64 hits on padding of each document, 0 unless `study`.
    """
    total = int(windows.offsets[-1])
    loss, confidence = np.empty((2, total), np.float32)
    rank = np.empty(total, np.int32)
    on_padding = np.zeros(len(documents), np.int64)
    size = {
        "sequence_length": sequence_length,
        "batch_size": bucketed_batch_size(len(windows), batch_size, devices),
        "end_token_id": end_token_id,
    }
    batches = study_batches(documents, **size) if study else row_batches(documents, windows, **size)

    def run() -> Iterator[tuple[np.ndarray, Batch, tuple[jax.Array, ...]]]:
        for chosen, batch in batches:
            yield chosen, batch, score(batch["tokens"], batch["targets"], batch.get("mask"))

    for chosen, batch, results in _one_ahead(run()):
        row_loss, row_rank, row_confidence = (np.asarray(x) for x in results)
        for row, index in enumerate(chosen):
            kept = np.flatnonzero(batch["weights"][row])
            start = windows.offsets[windows.document[index]] + windows.score[index]
            mine = slice(start, start + len(kept))
            loss[mine], rank[mine] = row_loss[row, kept], row_rank[row, kept]
            confidence[mine] = row_confidence[row, kept]
        if study:
            real = len(chosen)
            on_padding[chosen] = ((row_rank[:real] == 0) & (batch["weights"][:real] == 0)).sum(axis=1)
        advance(len(chosen))
    labels = window_labels(documents, windows, end_token_id)
    scores = TokenScores(windows.offsets, labels, windows.positions(), loss, rank, confidence)
    return scores, on_padding


def window_labels(documents: Documents, windows: Windows, end_token_id: int) -> np.ndarray:
    """[labels] int32: the tokens of each document, and an end token behind each unless the windows are rolling."""
    tokens = documents.tokens.astype(np.int32)
    if windows.offsets[-1] == len(tokens):
        return tokens
    return np.insert(tokens, documents.offsets[1:], end_token_id)


def _one_ahead(results: Iterator[Any]) -> Iterator[Any]:
    """The same items, each held back until the next is under way: the device works as the host collects."""
    held = next(results, None)
    for item in results:
        yield held
        held = item
    if held is not None:
        yield held
