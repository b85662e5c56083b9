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


def bitcast_to_uint16(x: jax.Array) -> jax.Array:
    """A 16-bit float as uint16, anything else as it is. Nothing can be differentiated through it."""
    narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize == 2
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if narrow else x


def bitcast_from_uint16(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The array of `dtype` that `bitcast_to_uint16` was given."""
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["bits"], meta_fields=["dtype"])
@dataclasses.dataclass(frozen=True)
class BitcastKernel:
    """A kernel [..., in, out] that nobody differentiates by; the leading axes are layers.

    Attributes:
        bits: [..., in, out], from `bitcast_to_uint16`.
        dtype: of the kernel.
    """

    bits: jax.Array
    dtype: jnp.dtype

    def astype(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The plain kernel [..., in, out] in `dtype`."""
        return bitcast_from_uint16(self.bits, self.dtype).astype(dtype)


def bitcast_kernel(kernel: jax.Array) -> BitcastKernel:
    """A kernel of any dtype as its bits."""
    return BitcastKernel(bitcast_to_uint16(kernel), kernel.dtype)


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["dtype"])
@dataclasses.dataclass(frozen=True)
class Dtype:
    """A dtype as a pytree without leaves, so that a forward pass can save it for the backward pass."""

    dtype: jnp.dtype
