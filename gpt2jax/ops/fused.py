"""GELU and LayerNorm with gradients of their own, which keep as little as they can from forward to backward pass.

Left to automatic differentiation, tanh GELU keeps six arrays of the mlp's width for every layer and a LayerNorm
three: that is most of a training step's memory, and on a CPU much of its time. Here each keeps one.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from gpt2jax.ops.bits import bitcast_from_uint16, bitcast_to_uint16

_SLOPE, _CUBE = math.sqrt(2.0 / math.pi), 0.044715


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gelu_tanh(x: jax.Array, kept_dtype: jnp.dtype) -> jax.Array:
    """The tanh form of GELU, as GPT-2 was trained with; its derivative is kept in `kept_dtype` for the backward pass.

    Source: Hendrycks and Gimpel 2016, "Gaussian Error Linear Units".
    """
    return (0.5 * x * (1.0 + _inner_tanh(x))).astype(x.dtype)


def _inner_tanh(x: jax.Array) -> jax.Array:
    return jnp.tanh(_SLOPE * (x + _CUBE * (x * x * x)))


def _gelu_forward(x, kept_dtype):
    wide = x.astype(jnp.float32)
    tanh = _inner_tanh(wide)
    inner_slope = _SLOPE * (1.0 + 3.0 * _CUBE * wide * wide)
    derivative = 0.5 * (1.0 + tanh) + 0.5 * wide * (1.0 - tanh * tanh) * inner_slope
    return (0.5 * wide * (1.0 + tanh)).astype(x.dtype), bitcast_to_uint16(derivative.astype(kept_dtype))


def _gelu_backward(kept_dtype, derivative, g):
    derivative = bitcast_from_uint16(derivative, kept_dtype).astype(jnp.float32)
    return ((g.astype(jnp.float32) * derivative).astype(g.dtype),)


gelu_tanh.defvjp(_gelu_forward, _gelu_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """Normalises the last axis of x [..., D], then scale [D] and bias [D]; float32 out.

    Statistics are float32 in two passes: one pass cancels for large means. What is kept is x itself.

    Source: Ba et al. 2016, "Layer Normalization".
    """
    normal, _ = _normalised(x, epsilon)
    return normal * scale + bias


def _normalised(x: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """x normalised, and one over its standard deviation [..., 1], both float32."""
    x = x.astype(jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon)
    return centred * inverse, inverse


def _layer_norm_forward(x, scale, bias, epsilon):
    return layer_norm(x, scale, bias, epsilon), (x, scale, bias)


def _layer_norm_backward(epsilon, kept, g):
    x, scale, bias = kept
    normal, inverse = _normalised(x, epsilon)
    g = g.astype(jnp.float32)
    rows = tuple(range(g.ndim - 1))
    scaled = g * scale
    along = (scaled * normal).mean(-1, keepdims=True)
    dx = (scaled - scaled.mean(-1, keepdims=True) - normal * along) * inverse
    return dx.astype(x.dtype), (g * normal).sum(rows).astype(scale.dtype), g.sum(rows).astype(bias.dtype)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)
