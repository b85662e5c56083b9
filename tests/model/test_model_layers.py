"""The layers by themselves."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from gpt2jax.model.layers import ForwardContext, LayerNorm
from gpt2jax.ops.device import Device
from gpt2jax.ops.precision import FLOAT32, Precision


def test_layer_norm_of_one_row_is_the_same_on_every_device():
    norm = LayerNorm(24, layers=(), epsilon=1e-5)
    norm.scale.set_value(jax.random.normal(jax.random.key(0), (24,)))
    norm.bias.set_value(jax.random.normal(jax.random.key(1), (24,)))
    x = 3.0 + 100.0 * jax.random.normal(jax.random.key(2), (1, 1, 24))
    gpu = ForwardContext(Precision.for_device("float32", Device("cuda", (9, 0))))
    expected = norm(x, ForwardContext(FLOAT32))
    for y in (norm(x, gpu), norm(jnp.tile(x, (3, 2, 1)), gpu)[:1, :1]):
        assert y.shape == x.shape
        np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)
    gradient = jax.grad(lambda x, ctx: (norm(x, ctx) ** 2).sum())
    np.testing.assert_allclose(gradient(x, gpu), gradient(x, ForwardContext(FLOAT32)), rtol=1e-5, atol=1e-6)
