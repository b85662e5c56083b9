"""Dropout, and the random keys of a call that may have none."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def dropout(x: Float[Array, "*axes"], rate: float, key: jax.Array | None) -> Float[Array, "*axes"]:
    """Set a fraction `rate` of `x` to zero and scale up the rest; return `x` itself without a key (inference)."""
    if key is None or rate == 0.0:
        return x
    # 16 random bits an element: half the work of a float32 draw, and a rate exact to 1/65536
    dropped = min(round(rate * 65536), 65535)
    keep = jax.random.bits(key, x.shape, jnp.uint16) >= dropped
    return jnp.where(keep, x * (65536 / (65536 - dropped)), jnp.zeros((), x.dtype)).astype(x.dtype)


def split_key(key: jax.Array | None, n: int) -> list[jax.Array | None]:
    """Split `key` into n keys; return n Nones if `key` is None."""
    return [None] * n if key is None else list(jax.random.split(key, n))
