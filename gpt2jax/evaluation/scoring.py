"""Scores every token of a batch on the device: loss, rank of the label, confidence.

Logits never leave the device and never exist for a whole batch: the head runs over blocks of the vocabulary. The
weights are prepared once for an evaluation: kernels in the compute dtype, the head in blocks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gpt2jax.data.documents import Documents
from gpt2jax.evaluation.accumulators import TokenScores
from gpt2jax.evaluation.windows import (
    Batch,
    Windows,
    bucketed_batch_size,
    window_batches,
    window_labels,
)
from gpt2jax.language_model import LanguageModel
from gpt2jax.model.config import GPT2Config
from gpt2jax.model.gpt2 import Params, hidden_states, lm_head_weight
from gpt2jax.ops.device import Device
from gpt2jax.ops.linear import bitcast_kernel
from gpt2jax.ops.precision import Precision, bitcast_from_uint16, bitcast_to_uint16, einsum_f32
from gpt2jax.train.unrolled import unstack_layers
from gpt2jax.utils.validation import must_be

# logits held at once on a CPU: 2048 ids for 4096 rows, 32 MiB at most. Blocks of the vocabulary take half the time of
# blocks of rows, which read the whole head for each block. An accelerator takes the whole vocabulary at once, and as
# many rows as its memory allows
VOCABULARY_BLOCK = 2048
MAX_ROWS = 4096

# numbers of a batch's rows [at most B], and loss, rank and confidence of its places [B, T]
ScoredBatch = tuple[np.ndarray, tuple[np.ndarray, ...]]


class Scorer:
    """A model prepared for scoring.

    Attributes:
        num_devices: devices that share each batch.
    """

    def __init__(
        self, model: LanguageModel, compute_dtype: str, devices: Sequence[Any] | None = None
    ) -> None:
        """Copy the weights to the devices, in the form that scoring reads.

        Args:
            model: a model with or without adapters.
            compute_dtype: operands of the matrix products.
            devices: devices to spread the rows of a batch over, each with a copy of the parameters. Default: all
                devices of this process.
        """
        devices = jax.local_devices() if devices is None else list(devices)
        if not devices or not all(isinstance(device, jax.Device) for device in devices):
            legal = "a list of at least one jax.Device, or None"
            raise ValueError(must_be("devices", legal, devices) + "; jax.devices() lists them")
        # neither dropout nor segments: no trial of the kernel for them
        place = Device.of(devices[0])
        self.precision = Precision.for_device(compute_dtype, place, masked_attention="blockwise")
        self.mesh = jax.sharding.Mesh(np.array(devices), ("devices",))
        self.config, self.num_devices = model.config, len(devices)
        params = _scoring_params(model.merge_adapter().params, self.precision)
        self.params = jax.device_put(params, NamedSharding(self.mesh, PartitionSpec()))

    def __call__(self, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return loss, rank and confidence (`head_scores`) of a batch, [B, T] each."""
        arrays = [batch[name] for name in ("tokens", "targets", "attention_mask") if name in batch]
        # [devices, rows of each, T]: with a separate axis, no later operation mixes rows of two devices
        arrays = [x.reshape(self.num_devices, -1, x.shape[-1]) for x in arrays]
        arrays = jax.device_put(arrays, NamedSharding(self.mesh, PartitionSpec("devices")))
        return _token_scores(self.params, *arrays, config=self.config, precision=self.precision)


@functools.partial(jax.jit, static_argnums=1)
def _scoring_params(params: Params, precision: Precision) -> Params:
    """Return the kernels in the compute dtype, and the head as an array beside the embedding, in blocks."""
    dtype, execution = precision.compute_dtype, precision.execution

    def cast(path, x):
        return bitcast_kernel(x.astype(dtype), execution) if path[-1].key == "kernel" else x

    body = {name: leaf for name, leaf in params.items() if name != "lm_head"}
    if execution.has_unrolled_layers:
        body = unstack_layers(body)
    return {
        "body": jax.tree_util.tree_map_with_path(cast, body),
        "head": head_blocks(lm_head_weight(params), precision),
    }


@functools.partial(jax.jit, static_argnames=("config", "precision"))
def _token_scores(params, tokens, targets, mask=None, *, config: GPT2Config, precision: Precision):
    def scores(tokens, targets, mask):
        # positions count padding too, as in Keras; padding is on the right, so no other figure depends on it
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden = hidden_states(
            params["body"],
            config,
            tokens,
            positions=positions,
            attention_mask=mask,
            precision=precision,
        )
        return head_scores(hidden, params["head"], targets, precision, config.vocab_size)

    if tokens.shape[0] == 1:
        return scores(tokens[0], targets[0], None if mask is None else mask[0])
    found = jax.vmap(scores, in_axes=(0, 0, None if mask is None else 0))(tokens, targets, mask)
    return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), found)


def head_scores(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, precision: Precision, vocab_size: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Score the label at every position.

    Args:
        hidden: [B, T, D] after the last LayerNorm.
        head: [blocks, block, D] from `head_blocks`, in the dtype of `precision` or as its bits.
        targets: [B, T] int.
        precision: dtypes of the product; softmax and loss are float32.
        vocab_size: V; rows of the head beyond it are padding.

    Returns:
        loss: float32 in nats, [B, T].
        rank: int32, tokens before the label when sorted by logit, ties by id, [B, T].
        confidence: float32, probability of the most likely token, [B, T].
    """

    def chunk(rows: tuple[jax.Array, jax.Array]):
        return _row_scores(*rows, head, precision, vocab_size)

    count = targets.size
    flat = (hidden.reshape(count, -1), targets.reshape(count))
    most = MAX_ROWS
    if not precision.execution.has_vocabulary_slices:
        most = max(1, precision.execution.logits_bytes // (4 * vocab_size))
    if count <= most:
        found = chunk(flat)
    else:
        chunks = math.ceil(count / most)

        def split(x):
            padded = jnp.pad(x, [(0, chunks * most - count)] + [(0, 0)] * (x.ndim - 1))
            return padded.reshape(chunks, most, *x.shape[1:])

        found = jax.lax.map(chunk, jax.tree.map(split, flat))
    loss, rank, confidence = (x.reshape(-1)[:count].reshape(targets.shape) for x in found)
    return loss, rank, confidence


def _row_scores(x, labels, head, precision: Precision, vocab_size: int):
    """Score rows [C, D] block by block of the vocabulary: the head is read once, logits stay in cache."""
    block = head.shape[1]
    x = x.astype(precision.compute_dtype)
    # the label's logit comes first: the others are compared with it
    own_rows = bitcast_from_uint16(head.reshape(-1, head.shape[2])[labels], precision.compute_dtype)
    own = (x.astype(jnp.float32) * own_rows.astype(jnp.float32)).sum(-1)

    def step(carry, part):
        top, total, rank = carry
        rows, start = part
        ids = start + jnp.arange(block)
        dtype = precision.compute_dtype
        logits = einsum_f32("cd,vd->cv", x, bitcast_from_uint16(rows, dtype), dtype, precision.execution)
        logits = jnp.where(ids < vocab_size, logits, -jnp.inf)
        higher = jnp.maximum(top, logits.max(axis=-1))
        total = total * jnp.exp(top - higher) + jnp.exp(logits - higher[:, None]).sum(axis=-1)
        mine, label = own[:, None], labels[:, None]
        # not "greater": with a logit of nan the label never counts as the most likely token
        ahead = ~(logits < mine) & ((logits != mine) | (ids < label)) & (ids != label)
        return (higher, total, rank + ahead.sum(axis=-1, dtype=jnp.int32)), None

    start = (jnp.full(own.shape, -jnp.inf), jnp.zeros_like(own), jnp.zeros(own.shape, jnp.int32))
    starts = jnp.arange(head.shape[0], dtype=jnp.int32) * block
    (top, total, rank), _ = jax.lax.scan(step, start, (head, starts))
    log_z = jnp.log(total) + top
    return log_z - own, rank, jnp.exp(top - log_z)


def head_blocks(head: jax.Array, precision: Precision) -> jax.Array:
    """Split the head [V, D] into [blocks, block, D], cast (and bit-cast, if the device needs it), padded with zeros."""
    vocab_size, dim = head.shape
    block = min(VOCABULARY_BLOCK, vocab_size) if precision.execution.has_vocabulary_slices else vocab_size
    blocks = math.ceil(vocab_size / block)
    filled = jnp.pad(head.astype(precision.compute_dtype), ((0, blocks * block - vocab_size), (0, 0)))
    return bitcast_to_uint16(filled.reshape(blocks, block, dim), precision.execution)


def score_windows(
    scorer: Scorer,
    documents: Documents,
    windows: Windows,
    *,
    sequence_length: int,
    batch_size: int,
    end_token_id: int,
    advance: Callable[[int], None] | None = None,
) -> TokenScores:
    """Score all labels of documents.

    Args:
        scorer: the model.
        documents, windows: what to run; its labels end with an end token unless the windows are rolling.
        sequence_length, batch_size: T, B.
        end_token_id: stands in front of each document.
        advance: called with the number of rows done.
    """
    batches = window_batches(
        documents,
        windows,
        sequence_length=sequence_length,
        batch_size=bucketed_batch_size(len(windows), batch_size, scorer.num_devices),
        end_token_id=end_token_id,
    )
    scores = empty_scores(documents, windows, end_token_id)
    for chosen, results in score_batches(scorer, batches):
        fill_scores(scores, windows, chosen, results)
        if advance is not None:
            advance(len(chosen))
    return scores


def score_batches(scorer: Scorer, batches: Iterable[tuple[np.ndarray, Batch]]) -> Iterator[ScoredBatch]:
    """Yield the scores of every batch; the device computes one batch ahead of the host."""
    pending: list[tuple[np.ndarray, tuple[jax.Array, ...]]] = []
    for chosen, batch in batches:
        pending.append((chosen, scorer(batch)))
        if len(pending) == 2:
            yield _fetch(*pending.pop(0))
    for chosen, results in pending:
        yield _fetch(chosen, results)


def _fetch(chosen: np.ndarray, results: tuple[jax.Array, ...]) -> ScoredBatch:
    return chosen, tuple(np.asarray(result) for result in results)


def empty_scores(documents: Documents, windows: Windows, end_token_id: int) -> TokenScores:
    """Return the scores of all labels before they are filled in."""
    labels = window_labels(documents, windows, end_token_id)
    loss, confidence = np.empty((2, len(labels)), np.float32)
    rank = np.empty(len(labels), np.int32)
    return TokenScores(windows.offsets, labels, windows.positions(), loss, rank, confidence)


def fill_scores(
    scores: TokenScores, windows: Windows, chosen: np.ndarray, results: Sequence[np.ndarray]
) -> None:
    """Write the scored labels of the rows `chosen` into `scores`."""
    for row, index in enumerate(chosen):
        inside = windows.scored(index)
        start = windows.offsets[windows.document[index]] + windows.score[index]
        place = slice(start, start + inside.stop - inside.start)
        for target, values in zip((scores.loss, scores.rank, scores.confidence), results, strict=True):
            target[place] = values[row, inside]
