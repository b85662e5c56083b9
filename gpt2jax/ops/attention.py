"""Causal attention: masks, products, and the ways that hold no [T, S] array from the forward to the backward pass."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gpt2jax.ops.bits import Dtype, bitcast_from_uint16, bitcast_to_uint16

# a finite value: a row that is masked throughout must stay finite, and -inf makes NaN in a softmax's gradient
MASKED = -1e30

# of long rows: their scores then fit a processor's cache
QUERY_BLOCK = 256


def causal_mask(length: int) -> jax.Array:
    """[1, 1, T, T] bool: a token attends to itself and to what is before it."""
    return jnp.tril(jnp.ones((length, length), bool))[None, None]


def einsum_f32(equation: str, a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The einsum of two operands in `dtype`, float32 sums and result."""
    # no TF32 where float32 is asked for
    exact = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    a, b = a.astype(dtype), b.astype(dtype)
    return jnp.einsum(equation, a, b, precision=exact, preferred_element_type=jnp.float32)


def supports_memory_efficient_attention(kind: str, head_dim: int, *, drops: bool) -> bool:
    """Whether `memory_efficient_attention` computes it: no dropout of probabilities, a head size that it knows."""
    if kind == "cudnn":
        return not drops and head_dim % 8 == 0 and head_dim <= 128
    return kind == "recompute" and not drops


def memory_efficient_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, causal: jax.Array, dtype: jnp.dtype, kind: str
) -> jax.Array:
    """q (scaled already), k, v [B, N, T, H] -> [B, N, T, H]; nothing of size T * T is kept for the backward pass.

    Args:
        causal: `causal_mask` of T.
        dtype: of the operands; for cuDNN float16 or bfloat16. Softmax and sums are float32.
        kind: "cudnn", the kernel of NVIDIA's library, which never holds the scores at all; "recompute", anywhere: the
            backward pass computes scores and softmax again.
    """
    if kind == "recompute":
        return _recomputed(q, k, v, causal, dtype)
    q, k, v = (x.swapaxes(1, 2).astype(dtype) for x in (q, k, v))
    y = jax.nn.dot_product_attention(q, k, v, scale=1.0, is_causal=True, implementation="cudnn")
    return y.swapaxes(1, 2)


def query_blocks(length: int) -> list[tuple[int, int]]:
    """Where blocks of queries begin and end. One needs the keys up to its end only: of long rows half is left out."""
    return [(begin, min(begin + QUERY_BLOCK, length)) for begin in range(0, length, QUERY_BLOCK)]


def _probabilities(q, k, causal, dtype, begin, end):
    """Of the queries from `begin` to `end`: [B, N, end - begin, end] float32."""
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
    kept = tuple(bitcast_to_uint16(x.astype(dtype)) for x in (q, k, v))
    return y, (*kept, causal, *(Dtype(x.dtype) for x in (q, k, v)))


def _attend_backward(dtype, kept, g):
    *operands, causal, q_dtype, k_dtype, v_dtype = kept
    q, k, v = (bitcast_from_uint16(x, dtype) for x in operands)
    # what a softmax's gradient takes off: the sum over keys of probability times its gradient, got without either
    dq, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for begin, end in query_blocks(q.shape[2]):
        rows, keys = (slice(None), slice(None), slice(begin, end)), (slice(None), slice(None), slice(0, end))
        p = _probabilities(q, k, causal, dtype, begin, end)
        dp = einsum_f32("...th,...sh->...ts", g[rows], v[keys], dtype)
        ds = p * (dp - (dp * p).sum(-1, keepdims=True))
        dq.append(einsum_f32("...ts,...sh->...th", ds, k[keys], dtype))
        dk = dk.at[keys].add(einsum_f32("...ts,...th->...sh", ds, q[rows], dtype))
        dv = dv.at[keys].add(einsum_f32("...ts,...th->...sh", p, g[rows], dtype))
    dq = jnp.concatenate(dq, axis=2)
    return dq.astype(q_dtype.dtype), dk.astype(k_dtype.dtype), dv.astype(v_dtype.dtype), None


_recomputed = jax.custom_vjp(_attend, nondiff_argnums=(4,))
_recomputed.defvjp(_attend_forward, _attend_backward)
