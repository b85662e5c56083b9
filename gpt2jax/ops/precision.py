"""Dtypes: which operands are rounded, the einsum with float32 accumulation, and residuals in 16 bits.

Parameters, optimizer moments, LayerNorm statistics, softmax and loss are always float32. What varies is the dtype of
the operands of matrix products (`compute_dtype`), of the activations between them (`activation_dtype`), and what the
device asks for (`execution`).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from gpt2jax.ops.device import CPU, Device, Execution
from gpt2jax.utils.validation import check, one_of

COMPUTE_DTYPES = ("float32", "tensorfloat32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Precision:
    """Dtypes of one computation, and how its device carries it out.

    Attributes:
        compute_dtype: operands of matrix products; products accumulate in float32.
        activation_dtype: activations between products (residual stream, hidden layers).
        execution: kernels, loops and result dtypes.
    """

    compute_dtype: jnp.dtype
    activation_dtype: jnp.dtype
    execution: Execution = CPU

    @classmethod
    def for_device(cls, compute_dtype: str, device: Device | None = None, **overrides: Any) -> Precision:
        """Choose the dtypes for `compute_dtype` that are fast on a device.

        A CPU emulates elementwise work in 16 bits through float32, so only its products have 16-bit operands. On an
        accelerator activations are 16-bit too, which halves their memory. "tensorfloat32" is float32 whose products
        may round their operands where a device has such products; elsewhere it equals "float32".

        Args:
            compute_dtype: one of `COMPUTE_DTYPES`.
            device: default: the first local device.
            **overrides: choices of `Execution` made by hand.

        Raises:
            ValueError: `compute_dtype` is not one of `COMPUTE_DTYPES`.
        """
        check("compute_dtype", compute_dtype, one_of(COMPUTE_DTYPES))
        device = device or Device.of()
        may_round = compute_dtype == "tensorfloat32"
        dtype = jnp.dtype("float32" if may_round else compute_dtype)
        overrides = {"allows_tf32": may_round and device.platform != "cpu"} | overrides
        activations = jnp.dtype(jnp.float32) if device.platform == "cpu" else dtype
        return cls(dtype, activations, Execution.for_device(device, dtype, **overrides))


FLOAT32 = Precision(jnp.dtype(jnp.float32), jnp.dtype(jnp.float32))


def einsum(
    equation: str,
    a: Shaped[Array, "*_a"],
    b: Shaped[Array, "*_b"],
    dtype: jnp.dtype,
    execution: Execution = CPU,
) -> Float[Array, "*_out"]:
    """Return the einsum of two operands cast to `dtype`, accumulated in float32.

    The result is float32; or 16-bit for 16-bit operands, if that is what the device should write.
    """
    if not (execution.has_narrow_results and dtype.itemsize == 2):
        return einsum_f32(equation, a, b, dtype, execution)
    return jnp.einsum(equation, a.astype(dtype), b.astype(dtype), preferred_element_type=dtype)


def einsum_f32(
    equation: str,
    a: Shaped[Array, "*_a"],
    b: Shaped[Array, "*_b"],
    dtype: jnp.dtype,
    execution: Execution = CPU,
) -> Float[Array, "*_out"]:
    """Return the einsum of two operands cast to `dtype`, accumulated in float32; the result is float32."""
    precision = None
    if dtype == jnp.float32:
        # HIGHEST: float32 operands must not become TF32 unless that is asked for
        rounds = {"tpu": jax.lax.Precision.HIGH}.get(execution.platform, jax.lax.Precision.DEFAULT)
        precision = rounds if execution.allows_tf32 else jax.lax.Precision.HIGHEST
    a, b = a.astype(dtype), b.astype(dtype)
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)


# XLA:CPU multiplies 16-bit floats, but upcasts them to slice, stack or gather: a loop that takes one layer out of an
# array of all layers would first convert the whole array to float32, and keep both. uint16 arrays are sliced as they
# are, and the bit-cast costs nothing there; on a GPU it costs kernels. Nothing can be differentiated through it.


def bitcast_to_uint16(x: Shaped[Array, "*axes"], execution: Execution = CPU) -> Shaped[Array, "*axes"]:
    """Bit-cast a 16-bit float to uint16 where the device needs it; return other arrays unchanged."""
    if not execution.has_bitcasts:
        return x
    is_16_bit = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize == 2
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if is_16_bit else x


def bitcast_from_uint16(x: Shaped[Array, "*axes"], dtype: jnp.dtype) -> Shaped[Array, "*axes"]:
    """Undo `bitcast_to_uint16` of an array of `dtype`."""
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["dtype"])
@dataclasses.dataclass(frozen=True)
class Dtype:
    """A dtype as a pytree without leaves, so that a forward pass can save it for the backward pass."""

    dtype: jnp.dtype
