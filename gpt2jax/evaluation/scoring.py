"""Scores of every token of a batch, computed on the device: loss, rank of the label, confidence.

Logits never leave the device, and are never there for a whole batch: the head runs over blocks of the vocabulary. The
weights are laid out once for an evaluation: kernels in the compute dtype, the head in blocks.
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

from gpt2jax.data.batches import Batch
from gpt2jax.data.documents import Documents
from gpt2jax.evaluation.accumulators import TokenScores
from gpt2jax.evaluation.windows import Windows, bucketed_batch_size, row_batches, study_batches
from gpt2jax.language_model import LanguageModel
from gpt2jax.model.config import GPT2Config
from gpt2jax.model.gpt2 import Params, hidden_states, lm_head_weight
from gpt2jax.ops.attention import einsum_f32
from gpt2jax.ops.bits import bitcast_from_uint16, bitcast_kernel, bitcast_to_uint16
from gpt2jax.ops.precision import Precision

# logits held at once on each device: of so many ids for so many rows, 32 MiB at most. On a CPU blocks of the vocabulary
# take half the time of blocks of rows, which read the whole head for each
VOCABULARY_BLOCK = 2048
MAX_ROWS = 4096

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
    precision = Precision.for_backend(compute_dtype)
    devices = jax.local_devices() if devices is None else list(devices)
    if not devices:
        raise ValueError("devices=[] must be at least one device, or None for all")
    for device in devices:
        if not isinstance(device, jax.Device):
            raise ValueError(f"devices: {device!r:.60} is none; jax.devices() gives them")
    mesh = jax.sharding.Mesh(np.array(devices), ("devices",))
    params = _scoring_params(model.merge_adapter().params, precision.compute_dtype)
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))

    def score(tokens, targets, mask):
        # [devices, rows of each, T]: with an axis of their own, nothing that follows mixes rows of two devices
        batch = [x.reshape(len(devices), -1, x.shape[-1]) for x in (tokens, targets, mask) if x is not None]
        batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("devices")))
        return _token_scores(params, *batch, config=model.config, precision=precision)

    return score, len(devices)


@functools.partial(jax.jit, static_argnums=1)
def _scoring_params(params: Params, dtype: jnp.dtype) -> Params:
    """Kernels in the compute dtype, and the head apart from the embedding, in blocks."""

    def cast(path, x):
        return bitcast_kernel(x.astype(dtype)) if path[-1].key == "kernel" else x

    body = {name: leaf for name, leaf in params.items() if name != "lm_head"}
    return {
        "body": jax.tree_util.tree_map_with_path(cast, body),
        "head": head_blocks(lm_head_weight(params), dtype),
    }


@functools.partial(jax.jit, static_argnames=("config", "precision"))
def _token_scores(params, tokens, targets, mask=None, *, config: GPT2Config, precision: Precision):
    def scores(tokens, targets, mask):
        # positions run on over padding, as in Keras; padding is on the right, so no other figure depends on it
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
    """Scores of the label at every position.

    Args:
        hidden: [B, T, D] after the last LayerNorm.
        head: [blocks, block, D] from `head_blocks`, in the dtype of `precision` or as its bits.
        targets: [B, T] int.
        precision: dtypes of the product; softmax and loss are float32.
        vocab_size: V; rows of the head from there on are filling.

    Returns:
        (loss float32 in nats, rank int32: tokens before the label when sorted by logit, equal ones by id; confidence
        float32: largest probability), each [B, T].
    """

    def chunk(rows: tuple[jax.Array, jax.Array]):
        return _row_scores(*rows, head, precision, vocab_size)

    count = targets.size
    flat = (hidden.reshape(count, -1), targets.reshape(count))
    if count <= MAX_ROWS:
        found = chunk(flat)
    else:
        chunks = math.ceil(count / MAX_ROWS)

        def cut(x):
            filled = jnp.pad(x, [(0, chunks * MAX_ROWS - count)] + [(0, 0)] * (x.ndim - 1))
            return filled.reshape(chunks, MAX_ROWS, *x.shape[1:])

        found = jax.lax.map(chunk, jax.tree.map(cut, flat))
    loss, rank, confidence = (x.reshape(-1)[:count].reshape(targets.shape) for x in found)
    return loss, rank, confidence


def _row_scores(x, labels, head, precision: Precision, vocab_size: int):
    """`head_scores` of rows [C, D], block by block of the vocabulary: the head is read once, logits stay in cache."""
    block = head.shape[1]
    x = x.astype(precision.compute_dtype)
    # the label's own logit first: the others are counted against it
    own_rows = bitcast_from_uint16(head.reshape(-1, head.shape[2])[labels], precision.compute_dtype)
    own = (x.astype(jnp.float32) * own_rows.astype(jnp.float32)).sum(-1)

    def step(carry, part):
        top, total, rank = carry
        rows, start = part
        ids = start + jnp.arange(block)
        logits = einsum_f32(
            "cd,vd->cv", x, bitcast_from_uint16(rows, precision.compute_dtype), precision.compute_dtype
        )
        logits = jnp.where(ids < vocab_size, logits, -jnp.inf)
        higher = jnp.maximum(top, logits.max(axis=-1))
        total = total * jnp.exp(top - higher) + jnp.exp(logits - higher[:, None]).sum(axis=-1)
        mine, label = own[:, None], labels[:, None]
        # not "greater": a logit that is no number is never a hit
        ahead = ~(logits < mine) & ((logits != mine) | (ids < label)) & (ids != label)
        return (higher, total, rank + ahead.sum(axis=-1, dtype=jnp.int32)), None

    start = (jnp.full(own.shape, -jnp.inf), jnp.zeros_like(own), jnp.zeros(own.shape, jnp.int32))
    starts = jnp.arange(head.shape[0], dtype=jnp.int32) * block
    (top, total, rank), _ = jax.lax.scan(step, start, (head, starts))
    log_z = jnp.log(total) + top
    return log_z - own, rank, jnp.exp(top - log_z)


def head_blocks(head: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """[V, D] -> [blocks, block, D] in `dtype` (`bitcast_to_uint16`), filled up with zeros."""
    vocab_size, dim = head.shape
    block = min(VOCABULARY_BLOCK, vocab_size)
    blocks = math.ceil(vocab_size / block)
    filled = jnp.pad(head.astype(dtype), ((0, blocks * block - vocab_size), (0, 0)))
    return bitcast_to_uint16(filled.reshape(blocks, block, dim))


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
            kept = np.flatnonzero(batch["loss_mask"][row])
            start = windows.offsets[windows.document[index]] + windows.score[index]
            mine = slice(start, start + len(kept))
            loss[mine], rank[mine] = row_loss[row, kept], row_rank[row, kept]
            confidence[mine] = row_confidence[row, kept]
        if study:
            real = len(chosen)
            on_padding[chosen] = ((row_rank[:real] == 0) & (batch["loss_mask"][:real] == 0)).sum(axis=1)
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
