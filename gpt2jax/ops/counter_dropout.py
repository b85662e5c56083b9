"""Dropout masks of attention from a counter, so that a kernel can make any tile of one when it needs it.

One call of Threefry-2x32 gives four draws of 16 bits, for four keys in a row. The counter holds head, query and key, so
that the mask does not depend on the tiles; the generator's key is drawn from the dropout key. A draw costs about 21
integer operations.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, UInt32

# a query's number takes the upper half of a word of the counter
MAX_LENGTH = 1 << 16
DRAWS = 4


def threefry_2x32(key: Sequence[Any], counter: Sequence[Any]) -> tuple[Any, Any]:
    """Return the two random words of a counter of two words: Threefry-2x32 of 20 rounds, all uint32."""
    words = (*key, key[0] ^ key[1] ^ np.uint32(0x1BD11BDA))
    a, b = counter[0] + words[0], counter[1] + words[1]
    for turn in range(5):
        for bits in ((13, 15, 26, 6), (17, 29, 16, 24))[turn % 2]:
            a = a + b
            b = ((b << np.uint32(bits)) | (b >> np.uint32(32 - bits))) ^ a
        a = a + words[(turn + 1) % 3]
        b = b + words[(turn + 2) % 3] + np.uint32(turn + 1)
    return a, b


def _dropped_draws(rate: float) -> int:
    """How many of the 65,536 values of a draw drop their element, as in `dropout`."""
    return min(round(rate * 65536), 65535)


def kept_scale(rate: float) -> float:
    """Return what elements that are kept are multiplied by."""
    return 65536 / (65536 - _dropped_draws(rate))


def kept_tile(
    seed: Sequence[Any], head: Any, query: Any, key: Any, shape: tuple[int, int], rate: float
) -> Bool[Array, "t s"]:
    """Return which elements of a tile are kept.

    Args:
        seed: two words.
        head: its number among those of all rows.
        query, key: the first ones of the tile; `key` is a multiple of 4.
        shape: queries and keys of the tile, the latter a multiple of 4.
        rate: of what is dropped.
    """
    groups = (shape[0], shape[1] // DRAWS)
    queries = jax.lax.broadcasted_iota(jnp.int32, groups, 0) + query
    keys = jax.lax.broadcasted_iota(jnp.int32, groups, 1) + key // DRAWS
    places = ((queries << 16) | keys).astype(jnp.uint32)
    heads = jnp.full(groups, head, jnp.int32).astype(jnp.uint32)
    words = jnp.stack(threefry_2x32(seed, (places, heads)), axis=-1)
    draws = jnp.stack([words & np.uint32(0xFFFF), words >> np.uint32(16)], axis=-1)
    return draws.astype(jnp.int32).reshape(shape) >= _dropped_draws(rate)


def dropout_seed(key: jax.Array) -> UInt32[Array, "words=2"]:
    """Draw the two words of a seed from a key of any of jax's generators."""
    return jax.random.bits(key, (2,), jnp.uint32)


def dropout_mask(key: jax.Array, shape: tuple[int, int, int], rate: float) -> Bool[Array, "B N T T"]:
    """Return a whole mask for `shape` = (B, N, T): True = kept."""
    *heads, length = shape
    seed = dropout_seed(key)
    tile = (length, -(-length // DRAWS) * DRAWS)
    kept = jax.vmap(lambda head: kept_tile((seed[0], seed[1]), head, 0, 0, tile, rate))
    return kept(jnp.arange(math.prod(heads)))[..., :length].reshape(*shape, length)
