"""Weights of one byte: 8-bit integers with one scale for each output, and products of them.

A weight is rounded once, to nearest, so that the largest magnitude of each output channel becomes 127. The operand is
rounded the same way for each row and each product ("dynamic" quantization), so both sides are integers and the sums
are exact; only the two roundings lose anything.

Source: Dettmers et al. 2022, "LLM.int8()", section 2 (vector-wise quantization).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

_LARGEST = 127


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "scale"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Int8Kernel:
    """A weight [K, M] of a matrix product.

    Attributes:
        values: [M, K] int8, a channel's numbers together: products with few rows read them up to three times as fast.
        scale: [M] float32; `values.T * scale` is the weight.
    """

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape[::-1]

    @property
    def dtype(self) -> jnp.dtype:
        return self.values.dtype


def quantize(kernel: jax.Array) -> Int8Kernel:
    """A weight [K, M] in one byte a number; a channel of zeros stays so."""
    values, scale = _rounded(kernel.T)
    return Int8Kernel(values, scale[:, 0])


def int8_matmul(x: jax.Array, kernel: Int8Kernel) -> jax.Array:
    """x [..., K] times a kernel [K, M] -> [..., M] float32."""
    rows = x.reshape(-1, x.shape[-1])
    count = rows.shape[0]
    if count == 1 and jax.default_backend() == "cpu":
        # for one narrow row XLA:CPU widens the whole weight first; with two it streams it
        rows = jnp.pad(rows, ((0, 1), (0, 0)))
    values, scale = _rounded(rows)
    product = jax.lax.dot_general(
        values, kernel.values, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
    )
    y = product[:count].astype(jnp.float32) * (scale[:count] * kernel.scale)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def _rounded(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x [R, K] as int8, and the float32 scale [R, 1] of each row."""
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    scale = jnp.where(largest > 0, largest, 1.0) / _LARGEST
    return jnp.round(x / scale).astype(jnp.int8), scale
