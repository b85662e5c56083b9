"""Causal attention: masks, products, and the ways that hold no [T, S] array from the forward to the backward pass."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gpt2jax.config import GPT2Config

# a finite value: a row that is masked throughout must stay finite, and -inf makes NaN in a softmax's gradient
MASKED = -1e30


def causal_mask(length: int) -> jax.Array:
    """[1, 1, T, T] bool: a token attends to itself and to what is before it."""
    return jnp.tril(jnp.ones((length, length), bool))[None, None]


def product(equation: str, a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The einsum of two operands in `dtype`, float32 sums and result."""
    # no TF32 where float32 is asked for
    exact = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    a, b = a.astype(dtype), b.astype(dtype)
    return jnp.einsum(equation, a, b, precision=exact, preferred_element_type=jnp.float32)


def lean_attention_takes(kind: str, config: GPT2Config, *, drops: bool) -> bool:
    """Whether `lean_attention` computes this model's attention: no dropout of probabilities, a head size it knows."""
    if kind == "cudnn":
        return not drops and config.head_dim % 8 == 0 and config.head_dim <= 128
    return kind == "recompute" and not drops


def lean_attention(
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


def _recomputed(q, k, v, causal, dtype):
    @jax.checkpoint
    def attend(q, k, v):
        scores = jnp.where(causal, product("...th,...sh->...ts", q, k, dtype), MASKED)
        return product("...ts,...sh->...th", jax.nn.softmax(scores, axis=-1), v, dtype)

    return attend(q.astype(dtype), k.astype(dtype), v.astype(dtype))
