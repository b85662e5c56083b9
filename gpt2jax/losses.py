"""Cross-entropy and accuracy as sums and counts, without ever holding float32 logits of a whole batch.

Losses return sums: they are divided once, by the number of real tokens over all micro-batches, devices and batches, so
that every token weighs the same however the batch is cut.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from gpt2jax.distributed import cut_rows, rows_cut_in, whole
from gpt2jax.model import output_logits
from gpt2jax.precision import FLOAT32, Precision, product_over_rows

# the most logits held at once: 32 Mi float32 values are 128 MiB, and one chunk for a small vocabulary or batch
MAX_LOGITS = 1 << 25


def chunk_size(rows: int, vocab_size: int, dtype: jax.typing.DTypeLike) -> int:
    """Rows of one chunk so that its logits on each device stay within `MAX_LOGITS`: equal chunks, multiples of 8.

    Narrow products (`dtype`) hold their operands once more: half as many logits then take as many bytes.
    """
    devices = rows_cut_in()
    most = MAX_LOGITS if jnp.dtype(dtype).itemsize == 4 else MAX_LOGITS // 2
    chunks = max(1, math.ceil(rows * vocab_size / (most * devices)))
    if devices > 1:  # without filling up, so that every device keeps its rows
        while rows % chunks:
            chunks += 1
        return rows // chunks
    return min(rows, math.ceil(math.ceil(rows / chunks) / 8) * 8)


def token_losses(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, precision: Precision = FLOAT32
) -> tuple[jax.Array, jax.Array]:
    """Loss and hit of every token; for evaluation.

    Args:
        hidden: [..., D] hidden states after the last LayerNorm.
        head: [V, D] output head.
        targets: [...] int, the token that follows.
        precision: dtypes of the product; softmax and loss are float32.

    Returns:
        (nll [...] float32 in nats, hit [...] bool: no token is more likely than the target).
    """

    def chunk(rows):
        nll, hit, _ = _softmax_loss(output_logits(rows[0], head, precision), rows[1])
        return nll, hit

    flat = (hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1))
    nll, hit = _map_chunks(chunk, flat, chunk_size(targets.size, head.shape[0], precision.compute_dtype))
    return nll.reshape(targets.shape), hit.reshape(targets.shape)


def cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    precision: Precision = FLOAT32,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted sum of the loss of every token; differentiable in `hidden` and `head`.

    A token's loss is its cross-entropy. With `label_smoothing` e it is that of (1 - e) times the label plus e times
    the uniform distribution (Szegedy et al. 2016); `z_loss` adds that many times log(Z)^2, Z the sum of the
    exponentials of the logits (Chowdhery et al. 2022).

    The gradient (softmax minus one-hot, through the head) is computed together with the loss, chunk by chunk, so the
    logits are computed once and are gone when the loss is known.

    Args:
        hidden: [..., D] hidden states after the last LayerNorm.
        head: [V, D] output head.
        targets: [...] int, the token that follows.
        weights: [...] float32, 0 for padding.
        precision: dtypes of the products; softmax, loss and sums are float32.

    Returns:
        (loss sum, {"nll": sum of the plain cross-entropy, "tokens": sum of weights, "correct": weighted count of
        hits}), float32 scalars. The three sums carry no gradient.
    """
    dim = hidden.shape[-1]
    loss, nll, correct = _differentiable_sums(
        hidden.reshape(-1, dim),
        head,
        targets.reshape(-1),
        weights.reshape(-1),
        precision,
        (label_smoothing, z_loss),
    )
    nll, correct = jax.lax.stop_gradient((nll, correct))
    return loss, {"nll": nll, "tokens": weights.sum(), "correct": correct}


def _sums(hidden, head, targets, weights, precision, extras) -> tuple[jax.Array, ...]:
    """Weighted sums over all tokens of loss, cross-entropy and hits."""

    def chunk(sums, rows):
        h, target, weight = rows
        logits = output_logits(h, head, precision)
        losses = _losses(logits, target, extras)[:3]
        return tuple(total + (x * weight).sum() for total, x in zip(sums, losses, strict=True)), None

    size = chunk_size(targets.size, head.shape[0], precision.compute_dtype)
    return _scan_chunks(chunk, (jnp.zeros(()),) * 3, (hidden, targets, weights), size)[0]


def _losses(logits, targets, extras) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Logits [C, V] -> (loss, nll, hit, log_z), each [C]."""
    label_smoothing, z_loss = extras
    nll, hit, log_z = _softmax_loss(logits, targets)
    loss = nll
    if label_smoothing:
        loss = (1.0 - label_smoothing) * nll + label_smoothing * (log_z - logits.mean(axis=-1))
    if z_loss:
        loss = loss + z_loss * jnp.square(log_z)
    return loss, nll, hit, log_z


def _sums_forward(hidden, head, targets, weights, precision, extras):
    label_smoothing, z_loss = extras
    dtype = precision.compute_dtype
    narrow_head = whole(head.astype(dtype))
    exact = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    product = functools.partial(jnp.einsum, precision=exact, preferred_element_type=jnp.float32)

    def chunk(carry, rows):
        sums, d_head = carry
        h, target, weight = rows
        h = h.astype(dtype)
        logits = product("cd,vd->cv", h, narrow_head)
        *losses, log_z = _losses(logits, target, extras)
        columns = jax.lax.broadcasted_iota(target.dtype, logits.shape, 1)
        probabilities = jnp.exp(logits - log_z[:, None])
        if z_loss:
            probabilities = probabilities * (1.0 + 2.0 * z_loss * log_z[:, None])
        wanted = jnp.where(columns == target[:, None], 1.0 - label_smoothing, 0.0)
        if label_smoothing:
            wanted = wanted + label_smoothing / head.shape[0]
        d_logits = ((probabilities - wanted) * weight[:, None]).astype(dtype)
        d_hidden = product("cv,vd->cd", d_logits, narrow_head)
        d_head = d_head + product_over_rows(d_logits, h, dtype)
        sums = tuple(total + (x * weight).sum() for total, x in zip(sums, losses, strict=True))
        return (sums, d_head), d_hidden

    start = ((jnp.zeros((), jnp.float32),) * 3, jnp.zeros(head.shape, jnp.float32))
    size = chunk_size(targets.size, head.shape[0], precision.compute_dtype)
    (sums, d_head), d_hidden = _scan_chunks(chunk, start, (hidden, targets, weights), size)
    return sums, (d_hidden, d_head, jnp.zeros((0,), hidden.dtype), jnp.zeros((0,), head.dtype))


def _sums_backward(precision, extras, saved, cotangents):
    d_hidden, d_head, hidden_like, head_like = saved
    scale = cotangents[0]  # the other two sums are for the log: no gradient
    # scaled in float32 before the cast: under float16 that is what loss scaling is for
    return (d_hidden * scale).astype(hidden_like.dtype), (d_head * scale).astype(head_like.dtype), None, None


_differentiable_sums = jax.custom_vjp(_sums, nondiff_argnums=(4, 5))
_differentiable_sums.defvjp(_sums_forward, _sums_backward)


def _softmax_loss(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits [C, V] float32, targets [C] -> (nll [C], hit [C], log of the softmax's denominator [C])."""
    highest = logits.max(axis=-1)
    # the sum of each row as a product: on a CPU XLA's sums over long rows take ten times as long
    ones = jnp.ones((logits.shape[-1], 1), jnp.float32)
    total = jnp.matmul(jnp.exp(logits - highest[:, None]), ones, precision=jax.lax.Precision.HIGHEST)
    log_z = jnp.log(total[:, 0]) + highest
    target_logits = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return log_z - target_logits, target_logits >= highest, log_z


def _map_chunks(function, rows, size):
    _, outputs = _scan_chunks(lambda carry, chunk: (carry, function(chunk)), (), rows, size)
    return outputs


def _scan_chunks(function, carry, rows, size):
    """`lax.scan` over chunks of `size` rows, the last one filled up with zeros (weight 0)."""
    count = jax.tree.leaves(rows)[0].shape[0]
    if size >= count:
        return function(carry, rows)
    chunks = -(-count // size)

    def cut(x):
        padding = [(0, chunks * size - count)] + [(0, 0)] * (x.ndim - 1)
        # every chunk takes rows from all over the batch: where devices hold a part of it each, all work at once
        x = jnp.pad(x, padding).reshape(size, chunks, *x.shape[1:])
        return cut_rows(x.swapaxes(0, 1), axis=1)

    def join(y):
        return y.swapaxes(0, 1).reshape(-1, *y.shape[2:])[:count]

    carry, outputs = jax.lax.scan(function, carry, jax.tree.map(cut, rows))
    return carry, jax.tree.map(join, outputs)
