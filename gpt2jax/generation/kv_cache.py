"""The key/value cache of decoding: a plain pytree that goes in and comes out, never hidden state.

One pair of arrays a layer, keys and values each [B * N, S, H]: separate arrays so that a step updates each of
them in place, batch and heads leading so that attention's products need no transposed copy, and both one axis
so that a batch of one is no special case. S counts slots, not positions: prompts are padded on the left, so
slot s of row b holds position s - padding[b].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from gpt2jax.model.config import GPT2Config
from gpt2jax.ops.attention import LayerCache

Cache = tuple[LayerCache, ...]


def init_cache(config: GPT2Config, batch: int, slots: int, dtype) -> Cache:
    """An empty cache: L pairs (keys, values), each [batch * N, slots, H] of zeros."""
    shape = (batch * config.n_head, slots, config.head_dim)
    return tuple(LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.n_layer))


def grow_cache(cache: Cache, slots: int) -> Cache:
    """The same cache with room for `slots` slots, at least as many as it has.

    Raises:
        ValueError: the cache already has more.
    """
    present = cache[0][0].shape[1]
    if slots < present:
        raise ValueError(f"a cache of {present} slots cannot be cut to {slots}")
    widths = ((0, 0), (0, slots - present), (0, 0))
    return jax.tree.map(lambda x: jnp.pad(x, widths), cache)


def cache_bytes(config: GPT2Config, batch: int, slots: int, dtype) -> int:
    """Bytes that `init_cache` with the same arguments takes: 2 * L * B * S * D * itemsize."""
    return 2 * config.n_layer * batch * slots * config.n_embd * np.dtype(dtype).itemsize
