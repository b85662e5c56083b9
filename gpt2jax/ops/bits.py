"""16-bit floats as the whole numbers that they are in memory, so that XLA:CPU leaves them alone.

It computes with such floats in matrix products, but slices, stacks and gathers them as float32: where a loop takes its
part of an array of all layers, the whole array is made wide first and kept beside the narrow one. Of whole numbers a
loop takes its part as it is, and to read them as floats again costs nothing.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp


def to_bits(x: jax.Array) -> jax.Array:
    """A 16-bit float as uint16, anything else as it is. Nothing can be differentiated through it."""
    narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize == 2
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if narrow else x


def from_bits(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The array of `dtype` that `to_bits` was given."""
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["bits"], meta_fields=["dtype"])
@dataclasses.dataclass(frozen=True)
class KernelBits:
    """A kernel [..., in, out] that nobody differentiates by; the leading axes are layers.

    Attributes:
        bits: [..., in, out], from `to_bits`.
        dtype: of the kernel.
    """

    bits: jax.Array
    dtype: jnp.dtype

    def astype(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The plain kernel [..., in, out] in `dtype`."""
        return from_bits(self.bits, self.dtype).astype(dtype)


def kernel_bits(kernel: jax.Array) -> KernelBits:
    """A kernel of any dtype as its bits."""
    return KernelBits(to_bits(kernel), kernel.dtype)


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["dtype"])
@dataclasses.dataclass(frozen=True)
class Dtype:
    """A dtype as a pytree without leaves, so that a forward pass can save it for the backward pass."""

    dtype: jnp.dtype
