"""Causal attention: one entry, `attention`, over the kernels that compute it, and the cache layout that it reads.

Axis letters: B batch, N heads, T queries, S keys, H head dim.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gpt2jax.ops.device import CPU, Execution
from gpt2jax.ops.dropout import dropout
from gpt2jax.ops.precision import Dtype, bitcast_from_uint16, bitcast_to_uint16, einsum, einsum_f32

# finite: a row with every key masked must stay finite, and -inf makes NaN in the gradient of a softmax
MASKED = -1e30


class LayerCache(NamedTuple):
    """Keys and values of one layer, each [B * N, S, H].

    XLA updates a cache in place only if the products read exactly what was written. Axes of size 1 that it would drop
    for them (a batch of one) once cost six copies of the whole cache, hence one axis for batch and heads.
    """

    keys: jax.Array
    values: jax.Array

    def update(
        self, k: Float[Array, "B N T H"], v: Float[Array, "B N T H"], position: jax.Array | int
    ) -> LayerCache:
        """Return the cache with `k` and `v` written at [position, position + T), which must not exceed S."""

        def write(cache, new):
            new = new.reshape(-1, *new.shape[2:]).astype(cache.dtype)
            return jax.lax.dynamic_update_slice_in_dim(cache, new, position, axis=1)

        return LayerCache(write(self.keys, k), write(self.values, v))


def causal_mask(length: int) -> Bool[Array, "1 1 T T"]:
    """Return the mask with which a token attends to itself and to the tokens before it."""
    return jnp.tril(jnp.ones((length, length), bool))[None, None]


def attention(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B N S H"] | Float[Array, "BN S H"],
    v: Float[Array, "B N S H"] | Float[Array, "BN S H"],
    mask: Bool[Array, "#B 1 T S"],
    *,
    dtype: jnp.dtype,
    scale: Float[Array, ""] | float = 1.0,
    is_causal: bool = False,
    segment_ids: Int[Array | np.ndarray, "B T"] | None = None,
    execution: Execution = CPU,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> Float[Array, "B N T H"]:
    """Return softmax(scale q k^T) v, by the fastest kernel that computes it.

    Args:
        q: queries.
        k, v: keys and values, or those of a `LayerCache`.
        mask: True = attend.
        dtype: of the operands of both products; softmax and sums are float32.
        scale: factor of the scores.
        is_causal: the mask is the causal mask and `segment_ids`, which allows the kernels that hold no mask.
        segment_ids: with `is_causal`, tokens attend only within their own segment.
        execution: of the device; its `attention` and `masked_attention` name the kernels.
        dropout_rate, dropout_key: dropout of the probabilities.
    """
    drops = dropout_key is not None and dropout_rate > 0
    is_fused = execution.attention == "cudnn" and not drops and segment_ids is None and is_causal
    if is_fused and supports_cudnn(q.shape[-1]) and isinstance(scale, float):
        q, k, v = (x.swapaxes(1, 2).astype(dtype) for x in (q, k, v))
        y = jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True, implementation="cudnn")
        return y.swapaxes(1, 2)
    q = q * scale
    is_masked = drops or segment_ids is not None
    if is_causal and is_masked and _takes_flash(execution, dtype, q.shape):
        # loads Pallas, which a CPU does not need
        from gpt2jax.ops.flash_attention import FlashForm, flash_attention

        flash_form = FlashForm(dtype, dropout_rate if drops else 0.0)
        return flash_attention(q, k, v, segment_ids, dropout_key if drops else None, flash_form)
    if is_causal and execution.attention != "plain" and (execution.blocks_masked_attention or not is_masked):
        form = BlockForm(dtype, execution, dropout_rate if drops else 0.0)
        return _blockwise_attention(q, k, v, segment_ids, dropout_key if drops else None, form)
    heads = q.shape[:2]
    scores = einsum_f32("...th,...sh->...ts", q.reshape(*k.shape[:-2], *q.shape[-2:]), k, dtype, execution)
    scores = scores.reshape(*heads, *scores.shape[-2:])
    probabilities = dropout(
        jax.nn.softmax(jnp.where(mask, scores, MASKED), axis=-1), dropout_rate, dropout_key
    )
    probabilities = probabilities.reshape(*k.shape[:-2], *scores.shape[-2:])
    y = einsum("...ts,...sh->...th", probabilities, v, dtype, execution)
    return y.reshape(*heads, *y.shape[-2:])


def supports_cudnn(head_dim: int) -> bool:
    """Return whether cuDNN's kernel takes heads of this many dimensions."""
    return head_dim % 8 == 0 and head_dim <= 128


def _takes_flash(execution: Execution, dtype: jnp.dtype, shape: tuple[int, ...]) -> bool:
    """Return whether the Pallas kernel computes attention with queries of this shape."""
    if execution.masked_attention != "pallas" or execution.attention == "plain" or dtype.itemsize != 2:
        return False
    from gpt2jax.ops.flash_attention import supports_flash

    # XLA would gather what a mesh shards, because it cannot look into a kernel
    mesh = jax.sharding.get_abstract_mesh()
    is_sharded = any(size > 1 for name, size in mesh.shape.items() if name not in mesh.manual_axes)
    return supports_flash(*shape[-2:]) and not is_sharded


# ---- attention by blocks of queries: nothing of size T * T is kept for the backward pass ----


@dataclasses.dataclass(frozen=True)
class BlockForm:
    """What blockwise attention is compiled for.

    Attributes:
        dtype: of the operands of the products.
        execution: of the device.
        dropout_rate: of the probabilities; a key comes with it.
    """

    dtype: jnp.dtype
    execution: Execution
    dropout_rate: float = 0.0


def query_blocks(length: int, size: int) -> list[tuple[int, int]]:
    """Return begin and end of each block of queries.

    A block needs only the keys up to its end, so that for long rows nearly half of the work is skipped.
    """
    return [(begin, min(begin + size, length)) for begin in range(0, length, size)]


def block_mask(begin: int, end: int, segment_ids: Any) -> Bool[Array, "#B 1 t s"]:
    """Return the causal mask of the queries from `begin` to `end`, within segments if there are some."""
    mask = causal_mask(end)[:, :, begin:]
    if segment_ids is not None:
        mask = mask & (segment_ids[:, None, begin:end, None] == segment_ids[:, None, None, :end])
    return mask


def _probabilities(q, k, segment_ids, form: BlockForm, begin: int, end: int):
    """Return the probabilities [B, N, end - begin, end] float32 of the queries from `begin` to `end`."""
    keys = k[:, :, :end]
    scores = einsum_f32("...th,...sh->...ts", q[:, :, begin:end], keys, form.dtype, form.execution)
    return jax.nn.softmax(jnp.where(block_mask(begin, end, segment_ids), scores, MASKED), axis=-1)


def _drop(x, key, form: BlockForm, begin: int):
    """Drop elements of a block; the same ones in the forward and the backward pass, so that nothing is kept."""
    return x if key is None else dropout(x, form.dropout_rate, jax.random.fold_in(key, begin))


def _attend(q, k, v, segment_ids, key, form: BlockForm):
    outputs = []
    for begin, end in query_blocks(q.shape[2], form.execution.attention_block):
        p = _drop(_probabilities(q, k, segment_ids, form, begin, end), key, form, begin)
        outputs.append(einsum("...ts,...sh->...th", p, v[:, :, :end], form.dtype, form.execution))
    return jnp.concatenate(outputs, axis=2)


def _attend_forward(q, k, v, segment_ids, key, form: BlockForm):
    y = _attend(q, k, v, segment_ids, key, form)
    saved = tuple(bitcast_to_uint16(x.astype(form.dtype), form.execution) for x in (q, k, v))
    return y, (*saved, segment_ids, key, *(Dtype(x.dtype) for x in (q, k, v)))


def _attend_backward(form: BlockForm, residuals, g):
    *operands, segment_ids, key, q_dtype, k_dtype, v_dtype = residuals
    dtype, execution = form.dtype, form.execution
    if execution.has_unrolled_layers:
        # without a loop XLA would merge this with the forward pass and keep the probabilities of all layers: 11 GB for
        # gpt2 at 16 x 1,024 tokens
        operands, key = jax.lax.optimization_barrier((operands, key))
    q, k, v = (bitcast_from_uint16(x, dtype) for x in operands)
    dq, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for begin, end in query_blocks(q.shape[2], execution.attention_block):
        rows, keys = (slice(None), slice(None), slice(begin, end)), (slice(None), slice(None), slice(0, end))
        p = _probabilities(q, k, segment_ids, form, begin, end)
        dropped = einsum_f32("...th,...sh->...ts", g[rows], v[keys], dtype, execution)
        dp = _drop(dropped, key, form, begin)
        ds = p * (dp - (dp * p).sum(-1, keepdims=True))  # the gradient of a softmax
        dq.append(einsum_f32("...ts,...sh->...th", ds, k[keys], dtype, execution))
        dk = dk.at[keys].add(einsum_f32("...ts,...th->...sh", ds, q[rows], dtype, execution))
        p = _drop(p, key, form, begin)
        dv = dv.at[keys].add(einsum_f32("...ts,...th->...sh", p, g[rows], dtype, execution))
    dq = jnp.concatenate(dq, axis=2)
    return dq.astype(q_dtype.dtype), dk.astype(k_dtype.dtype), dv.astype(v_dtype.dtype), None, None


_blockwise_attention = jax.custom_vjp(_attend, nondiff_argnums=(5,))
_blockwise_attention.defvjp(_attend_forward, _attend_backward)
