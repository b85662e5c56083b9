"""The key/value cache of decoding: a plain pytree that functions take and return.

A layer has one pair of arrays, keys and values, each [B * N, S, H]: separate arrays so that a step updates each of
them in place, batch and heads leading so that attention's products need no transposed copy, and both in one axis
because XLA drops an axis of size 1, which cost a batch of one six copies of each array. Prompts are padded on the
left, so cache position s of row b holds text position s - padding[b].
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from gpt2jax.model.config import GPT2Config
from gpt2jax.ops.attention import LayerCache
from gpt2jax.utils.validation import must_be

Cache = tuple[LayerCache, ...]


def init_cache(config: GPT2Config, batch: int, length: int, dtype) -> Cache:
    """Return an empty cache: L pairs (keys, values), each [batch * N, length, H] of zeros."""
    shape = (batch * config.n_head, length, config.head_dim)
    return tuple(LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.n_layer))


def grow_cache(cache: Any, length: int) -> Any:
    """Pad the arrays [B, S, ...] of a cache, or of any other pytree, to `length` positions.

    Raises:
        ValueError: an array is longer.
    """

    def pad(x: jax.Array) -> jax.Array:
        if length < x.shape[1]:
            raise ValueError(must_be("length", f"at least {x.shape[1]}, that of the cache", length))
        return jnp.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2))

    return jax.tree.map(pad, cache)
