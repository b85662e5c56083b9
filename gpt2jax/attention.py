"""Causal masks, and attention by one kernel of the GPU's library in place of products and a softmax of our own."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gpt2jax.config import GPT2Config


def causal_mask(length: int) -> jax.Array:
    """[1, 1, T, T] bool: a token attends to itself and to what is before it."""
    return jnp.tril(jnp.ones((length, length), bool))[None, None]


def fused_attention_takes(config: GPT2Config, dropout_key: jax.Array | None) -> bool:
    """Whether cuDNN's kernel computes this model's attention: no dropout of probabilities, a head size it knows."""
    drops = dropout_key is not None and config.attn_pdrop > 0
    return not drops and config.head_dim % 8 == 0 and config.head_dim <= 128


def fused_attention(q: jax.Array, k: jax.Array, v: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """q (scaled already), k, v [B, N, T, H] -> [B, N, T, H] in `dtype`, float16 or bfloat16, by cuDNN's causal kernel.

    It never holds the [T, T] scores; its softmax is float32.
    """
    q, k, v = (x.swapaxes(1, 2).astype(dtype) for x in (q, k, v))
    y = jax.nn.dot_product_attention(q, k, v, scale=1.0, is_causal=True, implementation="cudnn")
    return y.swapaxes(1, 2)
