"""Cross-entropy and accuracy as sums and counts, without ever holding float32 logits of a whole batch.

Losses return sums: they are divided once, by the number of real tokens over all micro-batches, devices and batches, so
that every token weighs the same however the batch is split.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gpt2jax.ops.linear import outer_product_sum
from gpt2jax.ops.precision import (
    FLOAT32,
    Precision,
    bitcast_from_uint16,
    bitcast_to_uint16,
    einsum,
    einsum_f32,
)
from gpt2jax.sharding import constrain_batch, num_batch_shards_in_scope, replicate

# the most columns of the vocabulary that a chunk's gradient is computed for at once: small enough for a CPU's caches
MAX_COLUMNS = 3200
# on a CPU the exponentials of a chunk are held for this part of its rows at once
ROW_BLOCKS = 8


def chunk_size(rows: int, vocab_size: int, precision: Precision = FLOAT32) -> int:
    """Return the rows of one chunk on one device: a multiple of 8 whose logits stay within `Execution.logits_bytes`.

    A small vocabulary or batch is one chunk. A size that divides the rows evenly and is not much smaller is preferred:
    then no chunk is padded.
    """
    itemsize = precision.compute_dtype.itemsize if precision.execution.has_narrow_results else 4
    chunks = max(1, math.ceil(rows * vocab_size * itemsize / precision.execution.logits_bytes))
    if chunks == 1:
        return rows
    size = math.ceil(rows / chunks / 8) * 8
    even = (smaller for smaller in range(size, size * 3 // 4, -8) if rows % smaller == 0)
    return next(even, size)


def column_slices(vocab_size: int) -> tuple[int, np.ndarray, np.ndarray]:
    """Slice the vocabulary into equal widths: (width, start of each slice, columns that it shares with the one before).

    The width is a multiple of 64, which GPUs need not pad, so the last slice begins early.
    """
    slices = math.ceil(vocab_size / MAX_COLUMNS)
    width = min(vocab_size, math.ceil(vocab_size / slices / 64) * 64)
    first = np.arange(0, vocab_size, width)
    starts = np.minimum(first, vocab_size - width)
    return width, starts, first - starts


def token_losses(
    hidden: Float[Array, "*B D"],
    head: Float[Array, "V D"],
    targets: Int[Array | np.ndarray, "*B"],
    precision: Precision = FLOAT32,
) -> tuple[Float[Array, "*B"], Bool[Array, "*B"]]:
    """Return loss and correctness of every token.

    Args:
        hidden: hidden states after the last LayerNorm.
        head: output head.
        targets: the token that follows.
        precision: dtypes of the product; softmax and loss are float32.

    Returns:
        (nll [...] float32 in nats, correct [...] bool: no token is more likely than the target).
    """

    dtype = precision.compute_dtype
    head_cast = _cast_head(head, precision)

    def chunk(_, rows):
        h, target = rows
        logits = _logits(h.astype(dtype), head_cast, precision)
        _, nll, correct, _ = _losses(logits, target, (0.0, 0.0), precision)
        return (), (nll, correct)

    def of_device(*rows):
        return _scan_chunks(chunk, (), rows, head.shape[0], precision)[1]

    nll, correct = _on_each_device(of_device, hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1))
    return nll.reshape(targets.shape), correct.reshape(targets.shape)


def cross_entropy(
    hidden: Float[Array, "*B D"],
    head: Float[Array, "V D"],
    targets: Int[Array | np.ndarray, "*B"],
    weights: Float[Array | np.ndarray, "*B"],
    precision: Precision = FLOAT32,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Float[Array, ""], dict[str, jax.Array]]:
    """Return the weighted sum of all tokens' losses; differentiable in `hidden` and `head`.

    A token's loss is its cross-entropy. With `label_smoothing` e it is that of (1 - e) times the label plus e times
    the uniform distribution (Szegedy et al. 2016); `z_loss` adds that many times log(Z)^2, Z the sum of the
    exponentials of the logits (Chowdhery et al. 2022).

    The gradient (softmax minus one-hot, through the head) is computed together with the loss, chunk by chunk, so the
    logits are computed once and are gone when the loss is known. Within a chunk of rows it is computed for a slice of
    the vocabulary after the other, so that no second array of the head's size is needed beside the gradient itself.

    Args:
        hidden: hidden states after the last LayerNorm.
        head: output head.
        targets: the token that follows.
        weights: 0 for padding.
        precision: dtypes of the products; softmax, loss and sums are float32.

    Returns:
        (loss sum, {"nll": sum of the plain cross-entropy, "tokens": sum of weights, "correct": weighted count
        of correct tokens}), float32 scalars. The three sums carry no gradient.
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
    """Return the weighted sums over all tokens of loss, cross-entropy and correct predictions."""
    dtype = precision.compute_dtype
    head_cast = _cast_head(head, precision)

    def chunk(sums, rows):
        h, target, weight = rows
        logits = _logits(h.astype(dtype), head_cast, precision)
        losses = _losses(logits, target, extras, precision)[:3]
        return _add_weighted(sums, losses, weight), None

    def of_device(*rows):
        return _scan_chunks(chunk, (jnp.zeros(()),) * 3, rows, head.shape[0], precision)[0]

    return tuple(x.sum() for x in _on_each_device(of_device, hidden, targets, weights))


def _sums_forward(hidden, head, targets, weights, precision, extras):
    dtype = precision.compute_dtype
    head_cast = _cast_head(head, precision)
    # bfloat16 has the range of float32: the gradient, which becomes bfloat16 anyway, loses nothing
    residual_dtype = jnp.bfloat16 if hidden.dtype == jnp.bfloat16 else jnp.float32

    def chunk(carry, rows):
        sums, d_head = carry
        h, target, weight = rows
        h = h.astype(dtype)
        logits = _logits(h, head_cast, precision)
        *losses, log_z = _losses(logits, target, extras, precision)
        gradients = _gradients if precision.execution.has_vocabulary_slices else _whole_gradients
        d_h, d_head = gradients(logits, log_z, h, target, weight, head_cast, d_head, extras, precision)
        return (_add_weighted(sums, losses, weight), d_head), d_h.astype(residual_dtype)

    def of_device(*rows):
        start = ((jnp.zeros(()),) * 3, jnp.zeros(head.shape, jnp.float32))
        return _scan_chunks(chunk, start, rows, head.shape[0], precision)

    (sums, d_head), d_hidden = _on_each_device(of_device, hidden, targets, weights)
    sums, d_head = jax.tree.map(lambda x: x.sum(axis=0), (sums, d_head))
    likes = (jnp.zeros((0,), hidden.dtype), jnp.zeros((0,), head.dtype))
    return sums, (d_hidden.reshape(hidden.shape), d_head, *likes)


def _sums_backward(precision, extras, saved, cotangents):
    d_hidden, d_head, hidden_like, head_like = saved
    scale = cotangents[0]  # the other two sums are for the log: no gradient
    # scaled in float32 before the cast: under float16 that is what loss scaling is for
    return (d_hidden * scale).astype(hidden_like.dtype), (d_head * scale).astype(head_like.dtype), None, None


_differentiable_sums = jax.custom_vjp(_sums, nondiff_argnums=(4, 5))
_differentiable_sums.defvjp(_sums_forward, _sums_backward)


def _cast_head(head: jax.Array, precision: Precision) -> jax.Array:
    """Cast the head [V, D] for products, replicated over devices; bit-cast if loops are to slice it."""
    return bitcast_to_uint16(replicate(head.astype(precision.compute_dtype)), precision.execution)


def _logits(h: jax.Array, head_cast: jax.Array, precision: Precision) -> jax.Array:
    """Compute logits [C, V] of hidden states [C, D] and the head [V, D] from `_cast_head`, of the same dtype.

    They are float32, or 16-bit where products have narrow results: 3.3 GB less to write and to read again for 16
    rows of 1,024 tokens, a tenth of what an H100 moves in a step of gpt2.
    """
    execution = precision.execution
    if not execution.has_vocabulary_slices or h.dtype.itemsize == 4:
        return einsum("cd,vd->cv", h, head_cast, h.dtype, execution)
    # by slices: all at once a CPU would keep a second head, of floats
    width, starts, _ = column_slices(len(head_cast))

    def columns(logits, start):
        kernel = bitcast_from_uint16(jax.lax.dynamic_slice_in_dim(head_cast, start, width), h.dtype)
        some = einsum_f32("cd,vd->cv", h, kernel, h.dtype, execution)
        return jax.lax.dynamic_update_slice_in_dim(logits, some, start, axis=1), None

    return jax.lax.scan(columns, jnp.zeros((len(h), len(head_cast)), jnp.float32), starts)[0]


def _whole_gradients(
    logits, log_z, h, targets, weights, head, d_head, extras, precision
) -> tuple[jax.Array, jax.Array]:
    """Compute what `_gradients` does, for the whole vocabulary at once."""
    d_logits = _logits_gradient(logits, log_z, targets, weights, len(head), extras).astype(h.dtype)
    d_h = einsum("cv,vd->cd", d_logits, head, h.dtype, precision.execution)
    return d_h, d_head + outer_product_sum(d_logits, h, h.dtype, precision.execution)


def _gradients(
    logits, log_z, h, targets, weights, head_cast, d_head, extras, precision
) -> tuple[jax.Array, jax.Array]:
    """Return one chunk's gradient by its hidden states `h` [C, D], and `d_head` [V, D] plus that by the head."""
    dtype, vocab_size = h.dtype, len(head_cast)
    width, starts, repeated = column_slices(vocab_size)

    def columns(carry, part):
        d_h, d_head = carry
        start, repeated = part
        some = jax.lax.dynamic_slice_in_dim(logits, start, width, axis=1)
        d_logits = _logits_gradient(some, log_z, targets - start, weights, vocab_size, extras)
        d_logits = jnp.where(jnp.arange(width) >= repeated, d_logits, 0.0).astype(dtype)
        kernel = bitcast_from_uint16(jax.lax.dynamic_slice_in_dim(head_cast, start, width), dtype)
        d_h = d_h + einsum_f32("cv,vd->cd", d_logits, kernel, dtype, precision.execution)
        update = outer_product_sum(d_logits, h, dtype, precision.execution)
        total = jax.lax.dynamic_slice_in_dim(d_head, start, width) + update
        return (d_h, jax.lax.dynamic_update_slice_in_dim(d_head, total, start, axis=0)), None

    start = (jnp.zeros(h.shape, jnp.float32), d_head)
    return jax.lax.scan(columns, start, (starts, repeated))[0]


def _logits_gradient(logits, log_z, targets, weights, vocab_size, extras) -> jax.Array:
    """Return the gradient by some columns [C, W] of the logits; `targets` [C] counts from the first of them."""
    label_smoothing, z_loss = extras
    probabilities = jnp.exp(logits.astype(jnp.float32) - log_z[:, None])
    if z_loss:
        probabilities = probabilities * (1.0 + 2.0 * z_loss * log_z[:, None])
    columns = jax.lax.broadcasted_iota(targets.dtype, logits.shape, 1)
    wanted = jnp.where(columns == targets[:, None], 1.0 - label_smoothing, 0.0)
    if label_smoothing:
        wanted = wanted + label_smoothing / vocab_size
    return (probabilities - wanted) * weights[:, None]


def _losses(
    logits, targets, extras, precision: Precision
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return loss, nll, correctness and the log of the softmax's denominator, each [C], for logits [C, V]."""
    if not precision.execution.has_cpu_shapes:
        return _losses_of_rows(logits, targets, extras, _reduce_in_one_pass)
    rows = len(targets)
    size = rows // ROW_BLOCKS if rows % ROW_BLOCKS == 0 else rows

    def block(start):
        some, wanted = (jax.lax.dynamic_slice_in_dim(x, start, size) for x in (logits, targets))
        return _losses_of_rows(some, wanted, extras, _reduce_one_by_one)

    return jax.tree.map(lambda x: x.reshape(rows), jax.lax.map(block, jnp.arange(0, rows, size)))


def _reduce_one_by_one(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Reduce logits [C, V] to the highest of each row, that of its target, and the sum of exp(logit - highest)."""
    highest = logits.max(axis=-1)
    of_target = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    exponentials = jnp.exp(logits - highest[:, None])
    # the sum as a product: XLA:CPU is slow at sums over long rows, the more it fuses with them
    ones = jnp.ones((logits.shape[-1], 1), logits.dtype)
    return highest, of_target, jnp.matmul(exponentials, ones, precision=jax.lax.Precision.HIGHEST)[:, 0]


def _reduce_in_one_pass(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Do the same in one pass over the logits: a sum is scaled down whenever a higher logit comes.

    A second pass reads 1.65 GB again for 16 rows of 1,024 tokens: 0.5 of 24 ms that gpt2's step takes an H100.

    Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax".
    """
    columns = jax.lax.broadcasted_iota(targets.dtype, logits.shape, 1)
    lowest = jnp.finfo(jnp.float32).min  # finite: the difference of two of them is 0
    of_target = jnp.where(columns == targets[:, None], logits, lowest)

    def merge(a, b):
        (high_a, target_a, sum_a), (high_b, target_b, sum_b) = a, b
        factor = jnp.exp(-jnp.abs(high_a - high_b))
        total = jnp.where(high_a > high_b, sum_a + factor * sum_b, factor * sum_a + sum_b)
        return jnp.maximum(high_a, high_b), jnp.maximum(target_a, target_b), total

    starts = (jnp.float32(lowest), jnp.float32(lowest), jnp.float32(0))
    return tuple(jax.lax.reduce((logits, of_target, jnp.ones_like(logits)), starts, merge, (1,)))


def _losses_of_rows(logits, targets, extras, reduce) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    label_smoothing, z_loss = extras
    logits = logits.astype(jnp.float32)
    highest, target_logits, total = reduce(logits, targets)
    log_z = jnp.log(total) + highest
    nll = log_z - target_logits
    loss = nll
    if label_smoothing:
        loss = (1.0 - label_smoothing) * nll + label_smoothing * (log_z - logits.mean(axis=-1))
    if z_loss:
        loss = loss + z_loss * jnp.square(log_z)
    return loss, nll, target_logits >= highest, log_z


def _add_weighted(sums, values, weights) -> tuple[jax.Array, ...]:
    return tuple(total + (x * weights).sum() for total, x in zip(sums, values, strict=True))


def _on_each_device(function, *rows):
    """Apply `function` to each device's rows of arrays [N, ...] separately; results are [devices, ...].

    A loop over chunks then needs nothing from other devices: their results are summed once, after it.
    """
    devices = num_batch_shards_in_scope()
    if devices == 1 or len(rows[0]) % devices:
        return jax.tree.map(lambda x: x[None], function(*rows))
    split = [constrain_batch(x.reshape(devices, -1, *x.shape[1:])) for x in rows]
    return jax.tree.map(constrain_batch, jax.vmap(function)(*split))


def _scan_chunks(function, carry, rows, vocab_size, precision):
    """Scan over chunks of arrays [N, ...] of rows; the last chunk is padded with zeros (weight 0)."""
    count = len(rows[0])
    size = chunk_size(count, vocab_size, precision)
    if size == count:
        return function(carry, rows)
    chunks = -(-count // size)

    def split(x):
        if chunks * size > count:
            x = jnp.pad(x, [(0, chunks * size - count)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(chunks, size, *x.shape[1:])

    carry, outputs = jax.lax.scan(function, carry, tuple(map(split, rows)))
    return carry, jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:])[:count], outputs)
