"""Dtypes: which operands are rounded, the einsum with float32 accumulation, and residuals in 16 bits.

Parameters, optimizer moments, LayerNorm statistics, softmax and loss are always float32. What varies is the dtype of
the operands of matrix products (`compute_dtype`) and of the activations between them (`activation_dtype`).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from gpt2jax.utils.validation import check, one_of

COMPUTE_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Precision:
    """Dtypes of one computation.

    Attributes:
        compute_dtype: operands of matrix products; products accumulate in float32.
        activation_dtype: activations between products (residual stream, hidden layers).
        attention: how attention with a causal mask alone is computed: "cudnn" or "recompute", see
            `memory_efficient_attention`; or "xla", which holds all scores.
    """

    compute_dtype: jnp.dtype
    activation_dtype: jnp.dtype
    attention: str = "xla"

    @classmethod
    def for_backend(cls, compute_dtype: str, *, backend: str | None = None) -> Precision:
        """Choose the dtypes for `compute_dtype` that are fast on `backend` (default: the one jax runs on).

        A CPU emulates elementwise work in 16 bits through float32, so only its products have 16-bit operands. On an
        accelerator activations are 16-bit too, which halves their memory. cuDNN's attention takes 16-bit operands
        only, and XLA uses it only on request.

        Raises:
            ValueError: `compute_dtype` is not one of `COMPUTE_DTYPES`.
        """
        dtype = jnp.dtype(check("compute_dtype", compute_dtype, one_of(COMPUTE_DTYPES)))
        backend = backend or jax.default_backend()
        kind = "cudnn" if backend in ("gpu", "cuda") and dtype.itemsize == 2 else "recompute"
        return cls(dtype, jnp.dtype(jnp.float32) if backend == "cpu" else dtype, kind)


FLOAT32 = Precision(jnp.dtype(jnp.float32), jnp.dtype(jnp.float32))


def einsum_f32(
    equation: str, a: Shaped[Array, ...], b: Shaped[Array, ...], dtype: jnp.dtype
) -> Float[Array, ...]:
    """Return the einsum of two operands cast to `dtype`, accumulated in float32; the result is float32."""
    # HIGHEST: float32 operands must not become TF32
    exact = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    a, b = a.astype(dtype), b.astype(dtype)
    return jnp.einsum(equation, a, b, precision=exact, preferred_element_type=jnp.float32)


# XLA:CPU multiplies 16-bit floats, but upcasts them to slice, stack or gather: a loop that takes one layer out of an
# array of all layers would first convert the whole array to float32, and keep both. uint16 arrays are sliced as they
# are, and the bit-cast costs nothing. Nothing can be differentiated through it.


def bitcast_to_uint16(x: Shaped[Array, "*axes"]) -> Shaped[Array, "*axes"]:
    """Bit-cast a 16-bit float to uint16; return an array of another dtype unchanged."""
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
