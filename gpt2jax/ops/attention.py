"""Causal attention: one entry, `attention`, over the kernels that compute it, and the cache layout that it reads.

Axis letters: B batch, N heads, T queries, S keys, H head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gpt2jax.ops.dropout import dropout
from gpt2jax.ops.precision import Dtype, bitcast_from_uint16, bitcast_to_uint16, einsum_f32

# finite: a row with every key masked must stay finite, and -inf makes NaN in the gradient of a softmax
MASKED = -1e30

# queries of a block in "recompute" attention: the scores of a block fit a processor's cache
QUERY_BLOCK = 256


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
    is_causal: bool = False,
    kind: str = "xla",
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> Float[Array, "B N T H"]:
    """Return softmax(q k^T) v, by the fastest kernel that computes it.

    Args:
        q: queries, scaled.
        k, v: keys and values, or those of a `LayerCache`.
        mask: True = attend.
        dtype: of the operands of both products; softmax and sums are float32.
        is_causal: `mask` is the causal mask and nothing else, which allows the kernels of other kinds than "xla".
        kind: see `memory_efficient_attention`.
        dropout_rate, dropout_key: dropout of the probabilities.
    """
    drops = dropout_key is not None and dropout_rate > 0
    if is_causal and supports_memory_efficient_attention(kind, q.shape[-1], drops=drops):
        return memory_efficient_attention(q, k, v, mask, dtype, kind)
    heads = q.shape[:2]
    scores = einsum_f32("...th,...sh->...ts", q.reshape(*k.shape[:-2], *q.shape[-2:]), k, dtype)
    scores = scores.reshape(*heads, *scores.shape[-2:])
    probabilities = dropout(
        jax.nn.softmax(jnp.where(mask, scores, MASKED), axis=-1), dropout_rate, dropout_key
    )
    probabilities = probabilities.reshape(*k.shape[:-2], *scores.shape[-2:])
    y = einsum_f32("...ts,...sh->...th", probabilities, v, dtype)
    return y.reshape(*heads, *y.shape[-2:])


def supports_memory_efficient_attention(kind: str, head_dim: int, *, drops: bool) -> bool:
    """Return whether `memory_efficient_attention` can compute it: neither kernel drops probabilities."""
    if kind == "cudnn":
        return not drops and head_dim % 8 == 0 and head_dim <= 128
    return kind == "recompute" and not drops


def memory_efficient_attention(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B N T H"],
    v: Float[Array, "B N T H"],
    causal: Bool[Array, "1 1 T T"],
    dtype: jnp.dtype,
    kind: str,
) -> Float[Array, "B N T H"]:
    """Return causal attention that saves nothing of size T * T for the backward pass.

    Args:
        q: queries, scaled.
        k, v: keys and values.
        causal: `causal_mask` of T.
        dtype: of the operands; for cuDNN float16 or bfloat16. Softmax and sums are float32.
        kind: "cudnn" is the kernel of NVIDIA's library, which never holds the scores at all; "recompute" runs anywhere
            and computes scores and softmax again in the backward pass.
    """
    if kind == "recompute":
        return _blockwise_attention(q, k, v, causal, dtype)
    q, k, v = (x.swapaxes(1, 2).astype(dtype) for x in (q, k, v))
    y = jax.nn.dot_product_attention(q, k, v, scale=1.0, is_causal=True, implementation="cudnn")
    return y.swapaxes(1, 2)


def query_blocks(length: int) -> list[tuple[int, int]]:
    """Return begin and end of each block of queries.

    A block needs only the keys up to its end, so that for long rows nearly half of the work is skipped.
    """
    return [(begin, min(begin + QUERY_BLOCK, length)) for begin in range(0, length, QUERY_BLOCK)]


def _probabilities(q, k, causal, dtype, begin, end):
    """Return the probabilities [B, N, end - begin, end] float32 of the queries from `begin` to `end`."""
    scores = einsum_f32("...th,...sh->...ts", q[:, :, begin:end], k[:, :, :end], dtype)
    return jax.nn.softmax(jnp.where(causal[:, :, begin:end, :end], scores, MASKED), axis=-1)


def _attend(q, k, v, causal, dtype):
    outputs = [
        einsum_f32(
            "...ts,...sh->...th", _probabilities(q, k, causal, dtype, *block), v[:, :, : block[1]], dtype
        )
        for block in query_blocks(q.shape[2])
    ]
    return jnp.concatenate(outputs, axis=2)


def _attend_forward(q, k, v, causal, dtype):
    y = _attend(q, k, v, causal, dtype)
    residuals = tuple(bitcast_to_uint16(x.astype(dtype)) for x in (q, k, v))
    return y, (*residuals, causal, *(Dtype(x.dtype) for x in (q, k, v)))


def _attend_backward(dtype, residuals, g):
    *operands, causal, q_dtype, k_dtype, v_dtype = residuals
    q, k, v = (bitcast_from_uint16(x, dtype) for x in operands)
    dq, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for begin, end in query_blocks(q.shape[2]):
        rows, keys = (slice(None), slice(None), slice(begin, end)), (slice(None), slice(None), slice(0, end))
        p = _probabilities(q, k, causal, dtype, begin, end)
        dp = einsum_f32("...th,...sh->...ts", g[rows], v[keys], dtype)
        ds = p * (dp - (dp * p).sum(-1, keepdims=True))  # the gradient of a softmax
        dq.append(einsum_f32("...ts,...sh->...th", ds, k[keys], dtype))
        dk = dk.at[keys].add(einsum_f32("...ts,...th->...sh", ds, q[rows], dtype))
        dv = dv.at[keys].add(einsum_f32("...ts,...th->...sh", p, g[rows], dtype))
    dq = jnp.concatenate(dq, axis=2)
    return dq.astype(q_dtype.dtype), dk.astype(k_dtype.dtype), dv.astype(v_dtype.dtype), None


_blockwise_attention = jax.custom_vjp(_attend, nondiff_argnums=(4,))
_blockwise_attention.defvjp(_attend_forward, _attend_backward)
