"""Kernels of one byte a number, as the frozen base of adapters: the rounding, and products with a gradient in x only.

Each output channel of a kernel is rounded once, to nearest, so that the largest magnitude of the channel becomes 127.
Whole numbers up to 127 are exact in every dtype of products, so this rounding is all that a base of int8 loses.

Source: Dettmers et al. 2022, "LLM.int8()", section 2 (vector-wise quantization).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from gpt2jax.ops.attention import einsum_f32

_LARGEST = 127
# brings values near 1 without rounding them
_UNIT = 128.0


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "scale"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Int8Kernel:
    """A kernel [..., in, out], which is `values * scale[..., None, :]`; the leading axes are layers.

    Attributes:
        values: [..., in, out] int8.
        scale: [..., out] float32.
    """

    values: jax.Array
    scale: jax.Array

    def astype(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The plain kernel [..., in, out]."""
        return (self.values.astype(jnp.float32) * self.scale[..., None, :]).astype(dtype)


def quantize_int8(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """x as int8, and the float32 scale that all numbers along `axis` share; the scale keeps the axis, of length 1.

    A number comes back within half a scale. Where all are zero they stay so.
    """
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=axis, keepdims=True)
    scale = jnp.where(largest > 0, largest, 1.0) / _LARGEST
    return jnp.round(x / scale).astype(jnp.int8), scale


@jax.jit  # one program: the steps between would be float32 arrays of all layers
def quantize_kernel(kernel: jax.Array) -> Int8Kernel:
    """A kernel [..., in, out], rounded."""
    values, scale = quantize_int8(kernel, axis=-2)
    return Int8Kernel(values, scale.squeeze(-2))


def int8_matmul(x: jax.Array, kernel: Int8Kernel, compute_dtype: jnp.dtype) -> jax.Array:
    """x [..., K] times a kernel [K, M] -> [..., M] float32; operands in `compute_dtype`, sums in float32.

    For the backward pass nothing is kept but the kernel as it is; the kernel has no gradient.
    """
    return _matmul(x, kernel, compute_dtype, x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _matmul(x, kernel, compute_dtype, x_dtype):
    return einsum_f32("...k,km->...m", x, kernel.values, compute_dtype) * kernel.scale


def _matmul_forward(x, kernel, compute_dtype, x_dtype):
    return _matmul(x, kernel, compute_dtype, x_dtype), kernel


def _matmul_backward(compute_dtype, x_dtype, kernel, g):
    # in units of the largest weights the cotangent stays as large as it is: in float16 g * scale would vanish
    g = g * (kernel.scale * _UNIT)
    dx = einsum_f32("...m,km->...k", g, kernel.values.astype(compute_dtype) / _UNIT, compute_dtype)
    return dx.astype(x_dtype), None


_matmul.defvjp(_matmul_forward, _matmul_backward)
