"""Which dtype does what: products in the compute dtype, sums in float32, and the rule that keeps both fast.

Parameters, optimizer moments, LayerNorm statistics, softmax and loss are float32 always. What varies is the dtype of
the operands of matrix products (`compute_dtype`) and of the activations between them (`activation_dtype`).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from gpt2jax.ops.bits import BitcastKernel, Dtype, bitcast_from_uint16, bitcast_to_uint16
from gpt2jax.ops.quantized import Int8Kernel, int8_matmul
from gpt2jax.ops.streamed import TransposedKernel, transposed_matmul

COMPUTE_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Precision:
    """Dtypes of one computation.

    Attributes:
        compute_dtype: operands of matrix products; products accumulate in float32.
        activation_dtype: what flows between them (residual stream, hidden layers).
        attention: how causal attention without other masks is computed: "xla", "cudnn" or "recompute" (attention.py).
    """

    compute_dtype: jnp.dtype
    activation_dtype: jnp.dtype
    attention: str = "xla"

    @classmethod
    def for_backend(cls, compute_dtype: str, *, backend: str | None = None) -> Precision:
        """Choose the dtypes for `compute_dtype` that are fast on `backend` (default: the one jax runs on).

        On a CPU elementwise work in 16 bits is emulated through float32, so only the products are narrow there. An
        accelerator keeps its activations narrow too, which halves their memory, and no [T, T] scores. On an NVIDIA GPU
        cuDNN's attention takes 16-bit operands only, and has to be asked for.

        Raises:
            ValueError: `compute_dtype` is none of `COMPUTE_DTYPES`.
        """
        if compute_dtype not in COMPUTE_DTYPES:
            raise ValueError(
                f"compute_dtype={compute_dtype!r} is not known; known: {', '.join(COMPUTE_DTYPES)}"
            )
        narrow = jnp.dtype(compute_dtype)
        backend = backend or jax.default_backend()
        attention = "recompute"
        if backend in ("gpu", "cuda") and narrow.itemsize == 2:
            attention = "cudnn"
        return cls(narrow, jnp.dtype(jnp.float32) if backend == "cpu" else narrow, attention)


FLOAT32 = Precision(jnp.dtype(jnp.float32), jnp.dtype(jnp.float32))


def matmul(
    x: jax.Array, w: jax.Array | TransposedKernel | Int8Kernel | BitcastKernel, compute_dtype: jnp.dtype
) -> jax.Array:
    """x [..., K] @ w [K, M] -> [..., M] float32, with both operands in `compute_dtype` and float32 sums.

    A weight as decoding streams it has its own dtype, whatever `compute_dtype` says, and no gradient; one in int8 or as
    bits, that adapters stand on, has none either.

    The gradient casts the incoming cotangent to `compute_dtype` before both backward products: without its own rule
    they would run in float32.
    """
    if isinstance(w, TransposedKernel):
        return transposed_matmul(x, w)
    if isinstance(w, Int8Kernel):
        return int8_matmul(x, w, compute_dtype)
    return _matmul(x, w, compute_dtype)


def _plain_matmul(x: jax.Array, w: jax.Array | BitcastKernel, compute_dtype: jnp.dtype) -> jax.Array:
    return _product(x, w, (((x.ndim - 1,), (0,)), ((), ())), compute_dtype)


def _product(a: jax.Array, b: jax.Array | BitcastKernel, dimensions, compute_dtype: jnp.dtype) -> jax.Array:
    highest = jax.lax.Precision.HIGHEST if compute_dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a.astype(compute_dtype),
        b.astype(compute_dtype),
        dimensions,
        precision=highest,
        preferred_element_type=jnp.float32,
    )


def _matmul_forward(x, w, compute_dtype):
    # the weight as it came: narrow copies of all layers would be kept from one pass to the other
    saved = (bitcast_to_uint16(x.astype(compute_dtype)), w, Dtype(x.dtype))
    return _plain_matmul(x, w, compute_dtype), saved


def _matmul_backward(compute_dtype, saved, g):
    x, w, x_dtype = saved
    x, g = bitcast_from_uint16(x, compute_dtype), g.astype(compute_dtype)
    dx = _product(g, w, (((g.ndim - 1,), (1,)), ((), ())), compute_dtype)
    dw = None if isinstance(w, BitcastKernel) else outer_product_sum(x, g, compute_dtype).astype(w.dtype)
    return dx.astype(x_dtype.dtype), dw


def outer_product_sum(a: jax.Array, b: jax.Array, compute_dtype: jnp.dtype) -> jax.Array:
    """a [..., K], b [..., M] -> [K, M] float32: the sum over all rows of their outer products.

    XLA:CPU takes 16-bit operands for this only where the rows have two axes (of one it makes float32 copies of both
    and multiplies those), and float32 operands faster where they have one.
    """
    if compute_dtype.itemsize == 2:
        rows = (2, -1) if a.ndim == 2 and len(a) % 2 == 0 else a.shape[:-1]
    else:
        rows = (-1,)
    a, b = (x.reshape(*rows, x.shape[-1]) for x in (a, b))
    axes = tuple(range(a.ndim - 1))
    return _product(a, b, ((axes, axes), ((), ())), compute_dtype)


_matmul = jax.custom_vjp(_plain_matmul, nondiff_argnums=(2,))
_matmul.defvjp(_matmul_forward, _matmul_backward)
