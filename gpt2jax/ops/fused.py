"""GELU and LayerNorm with their own gradients, which save as little as possible for the backward pass.

Under automatic differentiation, tanh GELU saves six arrays of the MLP's width for every layer and a LayerNorm three:
most of a training step's memory, and on a CPU much of its time. Here each saves one.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from gpt2jax.ops.device import CPU, Execution
from gpt2jax.ops.precision import bitcast_from_uint16, bitcast_to_uint16

_SLOPE, _CUBE = math.sqrt(2.0 / math.pi), 0.044715


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gelu_tanh(
    x: Float[Array, "*axes"], residual_dtype: jnp.dtype, execution: Execution = CPU
) -> Float[Array, "*axes"]:
    """Apply the tanh approximation of GELU, with which GPT-2 was trained.

    The backward pass gets its derivative in `residual_dtype`, or computes it from `x`, as `execution` says.

    Source: Hendrycks and Gimpel 2016, "Gaussian Error Linear Units".
    """
    return (0.5 * x * (1.0 + _inner_tanh(x))).astype(x.dtype)


def _inner_tanh(x: jax.Array) -> jax.Array:
    return jnp.tanh(_SLOPE * (x + _CUBE * (x * x * x)))


def _gelu_and_derivative(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return GELU and its derivative in float32."""
    x32 = x.astype(jnp.float32)
    tanh = _inner_tanh(x32)
    inner_slope = _SLOPE * (1.0 + 3.0 * _CUBE * x32 * x32)
    derivative = 0.5 * (1.0 + tanh) + 0.5 * x32 * (1.0 - tanh * tanh) * inner_slope
    return 0.5 * x32 * (1.0 + tanh), derivative


def _gelu_forward(x, residual_dtype, execution):
    y, derivative = _gelu_and_derivative(x)
    saved = bitcast_to_uint16(derivative.astype(residual_dtype)) if execution.saves_gelu_derivative else x
    return y.astype(x.dtype), saved


def _gelu_backward(residual_dtype, execution, saved, g):
    if execution.saves_gelu_derivative:
        derivative = bitcast_from_uint16(saved, residual_dtype).astype(jnp.float32)
    else:
        # the barrier keeps XLA from saving the tanh of the forward pass; `Linear` has one where results are narrow
        saved = saved if execution.has_narrow_results else jax.lax.optimization_barrier(saved)
        derivative = _gelu_and_derivative(saved)[1]
    return ((g.astype(jnp.float32) * derivative).astype(g.dtype),)


gelu_tanh.defvjp(_gelu_forward, _gelu_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def layer_norm(
    x: Float[Array, "*axes D"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"],
    epsilon: float,
    execution: Execution = CPU,
) -> Float32[Array, "*axes D"]:
    """Normalize the last axis of `x`, then multiply by `scale` and add `bias`.

    The statistics are float32, in two passes: one pass cancels for large means. Only `x` itself is saved.

    Source: Ba et al. 2016, "Layer Normalization".
    """
    mean, inverse = _statistics(x, epsilon)
    return (x.astype(jnp.float32) - mean) * inverse * scale + bias


def _statistics(x: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """Return the mean of the last axis and one over its standard deviation, each [..., 1] float32."""
    x = x.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    return mean, jax.lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + epsilon)


def _layer_norm_forward(x, scale, bias, epsilon, execution):
    return layer_norm(x, scale, bias, epsilon, execution), (x, scale, bias)


def _layer_norm_backward(epsilon, execution, residuals, g):
    x, scale, bias = residuals
    x32, g = x.astype(jnp.float32), g.astype(jnp.float32)
    mean, inverse = _statistics(x, epsilon)
    normal, scaled = (x32 - mean) * inverse, g * scale
    along = (scaled * normal).mean(-1, keepdims=True)
    dx = (scaled - scaled.mean(-1, keepdims=True) - normal * along) * inverse
    if not execution.has_cpu_shapes:
        # else XLA takes the products for the sums over rows from a kernel that computes the statistics as well, and
        # writes them in float32: 1.9 GB of the 57 that a step of gpt2 moves, 16 x 1,024 tokens
        mean, inverse = jax.lax.optimization_barrier((mean, inverse))
        normal = (x32 - mean) * inverse
    d_scale, d_bias = _sum_rows(g * normal, g, execution)
    return dx.astype(x.dtype), d_scale.astype(scale.dtype), d_bias.astype(bias.dtype)


def _sum_rows(a: jax.Array, b: jax.Array, execution: Execution) -> tuple[jax.Array, jax.Array]:
    """Sum two arrays [..., D] over all axes but the last; on an accelerator in one pass over what they come from."""
    rows = tuple(range(a.ndim - 1))
    if execution.has_cpu_shapes:
        return a.sum(rows), b.sum(rows)
    zero = jnp.zeros((), a.dtype)
    d_a, d_b = jax.lax.reduce((a, b), (zero, zero), lambda x, y: (x[0] + y[0], x[1] + y[1]), rows)
    return d_a, d_b


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)
