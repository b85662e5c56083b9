"""The matrix product of a linear layer, and the forms in which its kernel [in, out] is stored.

| form | layout | gradient | used for |
|---|---|---|---|
| array | [in, out] | in both operands | training |
| `BitcastKernel` | [in, out], 16-bit floats as uint16 | in the input | frozen weights under adapters, evaluation |
| `Int8Kernel` | [in, out], int8 with a scale for each output | in the input | frozen weights under adapters |
| `TransposedKernel` | [out, in], floats, or int8 with a scale for each output | none | decoding |

`matmul` takes all of them. A new form is a pytree with the two methods of `StoredKernel`. Its arrays end in the outputs
(except `TransposedKernel`'s), so that `sharding.py` shards them as it shards the plain kernel.

Source of the int8 forms: Dettmers et al. 2022, "LLM.int8()", section 2 (vector-wise quantization).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8, Shaped

from gpt2jax.ops.device import CPU, Execution
from gpt2jax.ops.precision import Dtype, bitcast_from_uint16, bitcast_to_uint16, einsum, einsum_f32

INT8_MAX = 127
# a power of two near it: brings int8 values near 1 without rounding them
_UNIT = 128.0


@runtime_checkable
class StoredKernel(Protocol):
    """A kernel [..., in, out] that is not stored as a float array; the leading axes are layers."""

    def matmul(self, x: Float[Array, "*B K"], dtype: jnp.dtype, execution: Execution) -> Float[Array, "*B M"]:
        """Multiply `x` by a kernel without leading axes, operands in `dtype`, accumulated in float32."""
        ...

    def dequantize(self) -> Float32[Array, "*L K M"]:
        """Return the plain kernel."""
        ...


Kernel = jax.Array | StoredKernel


def matmul(
    x: Float[Array, "*B K"], kernel: Kernel, dtype: jnp.dtype, execution: Execution = CPU
) -> Float[Array, "*B M"]:
    """Multiply `x` by a kernel [K, M] with both operands in `dtype`, accumulated in float32.

    The result is float32, or 16-bit if `execution` has narrow results.

    The gradient casts the incoming cotangent to `dtype` before both backward products; without its own rule they would
    run in float32. A stored kernel has no gradient, and a `TransposedKernel` ignores `dtype` for its own.
    """
    if isinstance(kernel, StoredKernel):
        return kernel.matmul(x, dtype, execution)
    return _dense_matmul(x, kernel, dtype, execution)


def dequantize(kernel: Kernel) -> Float32[Array, "*_axes"]:
    """Return a kernel of any form as a float32 array [..., in, out]."""
    return kernel.dequantize() if isinstance(kernel, StoredKernel) else kernel.astype(jnp.float32)


# ---- arrays: a gradient in both operands ----


def _multiply(x, kernel, dtype, execution):
    return einsum("...k,km->...m", x, kernel, dtype, execution)


def _dense_forward(x, kernel, dtype, execution):
    # saves the kernel as it came: 16-bit copies of all layers would be kept from the forward to the backward pass
    saved = (bitcast_to_uint16(x.astype(dtype), execution), kernel, Dtype(x.dtype))
    # not _dense_matmul: rematerialization policies do not see products inside a custom_vjp
    return _multiply(x, kernel, dtype, execution), saved


def _dense_backward(dtype, execution, saved, g):
    x, kernel, x_dtype = saved
    x, g = bitcast_from_uint16(x, dtype), g.astype(dtype)
    dx = einsum("...m,km->...k", g, kernel, dtype, execution)
    return dx.astype(x_dtype.dtype), outer_product_sum(x, g, dtype, execution).astype(kernel.dtype)


_dense_matmul = jax.custom_vjp(_multiply, nondiff_argnums=(2, 3))
_dense_matmul.defvjp(_dense_forward, _dense_backward)


def outer_product_sum(
    a: Float[Array, "*B K"], b: Float[Array, "*B M"], dtype: jnp.dtype, execution: Execution = CPU
) -> Float32[Array, "K M"]:
    """Return the sum over all rows of their outer products: the gradient of a kernel.

    XLA:CPU multiplies 16-bit operands only if the rows have two axes (with one axis it makes float32 copies of both
    operands), and float32 operands faster if the rows have one axis.
    """
    if dtype.itemsize == 2 and execution.has_cpu_shapes:
        rows = (2, -1) if a.ndim == 2 and len(a) % 2 == 0 else a.shape[:-1]
    else:
        rows = (-1,)
    a, b = (x.reshape(*rows, x.shape[-1]) for x in (a, b))
    axes = "abcdefgh"[: a.ndim - 1]
    return einsum_f32(f"{axes}k,{axes}m->km", a, b, dtype, execution)


# ---- biases ----


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def add_bias(y: Float[Array, "*B M"], bias: Float[Array, " M"], dtype: jnp.dtype) -> Float[Array, "*B M"]:
    """Return y + bias in `dtype`, for accelerators.

    The gradient is rounded to the dtype of `y` before it is summed. Left alone, XLA keeps it in float32 for that sum,
    as a second array beside the one that the products read: 7 GB of the 70 that a step of gpt2 moves.
    """
    return (y.astype(jnp.float32) + bias).astype(dtype)


def _add_bias_forward(y, bias, dtype):
    return add_bias(y, bias, dtype), (Dtype(y.dtype), Dtype(bias.dtype))


def _add_bias_backward(dtype, dtypes, g):
    g = jax.lax.optimization_barrier(g.astype(dtypes[0].dtype))
    return g, g.astype(jnp.float32).sum(tuple(range(g.ndim - 1))).astype(dtypes[1].dtype)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


# ---- frozen kernels: a gradient in the input alone, which saves nothing but the kernel itself ----


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _frozen_matmul(x, kernel, dtype, x_dtype, execution):
    return kernel.multiply(x, dtype, execution)


def _frozen_forward(x, kernel, dtype, x_dtype, execution):
    return kernel.multiply(x, dtype, execution), kernel


def _frozen_backward(dtype, x_dtype, execution, kernel, g):
    return kernel.input_gradient(g, dtype, execution).astype(x_dtype), None


_frozen_matmul.defvjp(_frozen_forward, _frozen_backward)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["bits"], meta_fields=["dtype"])
@dataclasses.dataclass(frozen=True)
class BitcastKernel:
    """A frozen kernel, stored as the bits of its 16-bit floats: see `bitcast_to_uint16`.

    Attributes:
        bits: [..., in, out] uint16, or the kernel itself if it is float32 or the device needs no bits.
        dtype: of the kernel.
    """

    bits: jax.Array
    dtype: jnp.dtype

    def matmul(
        self, x: Float[Array, "*B K"], dtype: jnp.dtype, execution: Execution = CPU
    ) -> Float[Array, "*B M"]:
        """Multiply `x` by the kernel."""
        return _frozen_matmul(x, self, dtype, x.dtype, execution)

    def dequantize(self) -> Float32[Array, "*L K M"]:
        """Return the kernel as float32."""
        return self._floats().astype(jnp.float32)

    def _floats(self) -> jax.Array:
        return bitcast_from_uint16(self.bits, self.dtype)

    def multiply(self, x: jax.Array, dtype: jnp.dtype, execution: Execution) -> jax.Array:
        """Return the forward product."""
        return einsum("...k,km->...m", x, self._floats(), dtype, execution)

    def input_gradient(self, g: jax.Array, dtype: jnp.dtype, execution: Execution) -> jax.Array:
        """Return the gradient in the input for the cotangent `g` [..., out]."""
        return einsum("...m,km->...k", g, self._floats(), dtype, execution)


def bitcast_kernel(kernel: Float[Array, "*L K M"], execution: Execution = CPU) -> BitcastKernel:
    """Store a kernel of any float dtype as its bits; as it is where the device needs no bits."""
    return BitcastKernel(bitcast_to_uint16(kernel, execution), kernel.dtype)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "scale"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Int8Kernel:
    """A frozen kernel `values * scale`, with each output channel rounded once.

    Integers up to 127 are exact in every compute dtype, so this rounding is all that is lost.

    Attributes:
        values: [..., in, out] int8.
        scale: [..., 1, out] float32.
    """

    values: jax.Array
    scale: jax.Array

    def matmul(
        self, x: Float[Array, "*B K"], dtype: jnp.dtype, execution: Execution = CPU
    ) -> Float[Array, "*B M"]:
        """Multiply `x` by the kernel."""
        return _frozen_matmul(x, self, dtype, x.dtype, execution)

    def dequantize(self) -> Float32[Array, "*L K M"]:
        """Return the kernel as float32."""
        return self.values.astype(jnp.float32) * self.scale

    def multiply(self, x: jax.Array, dtype: jnp.dtype, execution: Execution) -> jax.Array:
        """Return the forward product."""
        return einsum_f32("...k,km->...m", x, self.values, dtype, execution) * self.scale[0]

    def input_gradient(self, g: jax.Array, dtype: jnp.dtype, execution: Execution) -> jax.Array:
        """Return the gradient in the input for the cotangent `g` [..., out]."""
        # in units of the largest weights the cotangent keeps its size: g * scale would underflow in float16
        g = g * (self.scale[0] * _UNIT)
        return einsum_f32("...m,km->...k", g, self.values.astype(dtype) / _UNIT, dtype, execution)


@jax.jit  # one program: the intermediate results would be float32 arrays of all layers
def quantize_kernel(kernel: Float[Array, "*L K M"]) -> Int8Kernel:
    """Round a kernel to int8, each output channel with its own scale."""
    return Int8Kernel(*quantize_int8(kernel, axis=-2))


def quantize_int8(
    x: Float[Array, "*_x"], axis: int
) -> tuple[Int8[Array, "*_values"], Float32[Array, "*_scales"]]:
    """Round `x` to int8, symmetrically: the largest magnitude along `axis` becomes 127.

    Returns:
        Values, and their scale with `axis` kept at length 1. A number comes back within half a scale; zeros stay zero.
    """
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=axis, keepdims=True)
    scale = jnp.where(largest > 0, largest, 1.0) / INT8_MAX
    return jnp.round(x / scale).astype(jnp.int8), scale


# ---- decoding: the weights of an output lie together ----


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "scale"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class TransposedKernel:
    """A kernel for products with few rows, stored [out, in].

    XLA's products with one to some dozens of rows read this layout up to three times as fast as [in, out] on a CPU,
    and no slower elsewhere; the output head of a GPT-2 has it already.

    With int8 values the input is rounded in the same way for each row of each product ("dynamic" quantization): both
    operands are integers and the sums are exact, so only the two roundings lose anything.

    Attributes:
        values: [out, in].
        scale: [out] float32 for int8 values, else None.
    """

    values: jax.Array
    scale: jax.Array | None = None

    def dequantize(self) -> Float32[Array, "K M"]:
        """Return the kernel as a float32 array [in, out]."""
        values = self.values.T.astype(jnp.float32)
        return values if self.scale is None else values * self.scale

    def matmul(
        self, x: Float[Array, "*B K"], dtype: jnp.dtype | None = None, execution: Execution = CPU
    ) -> Float[Array, "*B M"]:
        """Multiply `x` by the kernel, with operands in the kernel's dtype whatever `dtype` is."""
        rows = x.reshape(-1, x.shape[-1])
        count = rows.shape[0]
        if count == 1 and self.values.dtype.itemsize < 4 and execution.has_cpu_shapes:
            # for one row below 32 bits XLA:CPU upcasts the whole kernel first; for two it streams it as it is
            rows = jnp.pad(rows, ((0, 1), (0, 0)))
        if self.scale is None:
            y = einsum("rk,mk->rm", rows, self.values, self.values.dtype, execution)[:count]
        else:
            values, scale = quantize_int8(rows, axis=-1)
            y = jnp.einsum("rk,mk->rm", values, self.values, preferred_element_type=jnp.int32)[:count]
            y = y.astype(jnp.float32) * (scale[:count] * self.scale)
        return y.reshape(*x.shape[:-1], y.shape[-1])


def transpose_kernel(rows: Shaped[Array, "M K"], dtype: jnp.dtype) -> TransposedKernel:
    """Store a kernel that is given as [out, in] in `dtype`; int8 rounds each output channel."""
    if dtype == jnp.int8:
        values, scale = quantize_int8(rows, axis=-1)
        return TransposedKernel(values, scale[:, 0])
    return TransposedKernel(rows.astype(dtype))
