"""Weights as decoding streams them, and products with them.

The numbers of an output channel lie together. XLA's products with one to some dozens of rows read that layout up to
three times as fast on a CPU as [in, out], and no slower elsewhere; the output head of a GPT-2 has it already.

With 8 bits a weight has one scale for each channel and is rounded once (quantized.py). The operand is rounded the same
way for each row and each product ("dynamic" quantization), so both sides are integers and the sums are exact; only the
two roundings lose anything.

Source: Dettmers et al. 2022, "LLM.int8()", section 2 (vector-wise quantization).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from gpt2jax.ops.quantized import quantize_int8


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "scale"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class TransposedKernel:
    """A weight [K, M] of a matrix product.

    Attributes:
        values: [M, K].
        scale: [M] float32 where the values are int8: `values.T * scale` is the weight. None: it is `values.T`.
    """

    values: jax.Array
    scale: jax.Array | None = None


def transpose_kernel(rows: jax.Array, dtype: jnp.dtype) -> TransposedKernel:
    """A weight given as [M, K], stored as `dtype`; a channel of zeros stays one."""
    if dtype == jnp.int8:
        values, scale = quantize_int8(rows, axis=-1)
        return TransposedKernel(values, scale[:, 0])
    return TransposedKernel(rows.astype(dtype))


def transposed_matmul(x: jax.Array, kernel: TransposedKernel) -> jax.Array:
    """x [..., K] times a kernel [K, M] -> [..., M] float32; operands in the kernel's dtype."""
    rows = x.reshape(-1, x.shape[-1])
    count = rows.shape[0]
    if count == 1 and kernel.values.dtype.itemsize < 4 and jax.default_backend() == "cpu":
        # for one narrow row XLA:CPU widens the whole weight first; with two it streams it at the speed of memory
        rows = jnp.pad(rows, ((0, 1), (0, 0)))
    if kernel.scale is None:
        y = _product(rows.astype(kernel.values.dtype), kernel.values, jnp.float32)[:count]
    else:
        values, scale = quantize_int8(rows, axis=-1)
        y = _product(values, kernel.values, jnp.int32)[:count].astype(jnp.float32)
        y = y * (scale[:count] * kernel.scale)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _product(rows: jax.Array, values: jax.Array, result: jax.typing.DTypeLike) -> jax.Array:
    exact = jax.lax.Precision.HIGHEST if values.dtype == jnp.float32 else None
    contracted = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(rows, values, contracted, precision=exact, preferred_element_type=result)
