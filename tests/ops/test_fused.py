"""GELU and LayerNorm with their own gradients: against automatic differentiation, and what they save."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import TINY

from gpt2jax.model.gpt2 import abstract_params, hidden_states
from gpt2jax.ops.device import Device, Execution
from gpt2jax.ops.fused import gelu_tanh, layer_norm
from gpt2jax.ops.precision import Precision

X = np.random.default_rng(0).normal(0.3, 2.0, (5, 7, 16)).astype(np.float32)
SCALE, BIAS = np.random.default_rng(1).normal(1.0, 0.3, (2, 16)).astype(np.float32)


def plain_layer_norm(x, scale, bias, epsilon):
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon) * scale + bias


def weighted(function):
    """A scalar whose gradient needs every element of what `function` gives."""
    return lambda *args: (function(*args) * jnp.cos(jnp.arange(X.size).reshape(X.shape))).sum()


@pytest.mark.slow
def test_gelu_tanh_value_and_gradient():
    own, plain = lambda x: gelu_tanh(x, jnp.dtype("float32")), jax.nn.gelu
    x = jnp.concatenate([X.ravel()[:-4], jnp.array([-40.0, -5.0, 0.0, 40.0])]).reshape(X.shape)
    np.testing.assert_allclose(own(x), plain(x), atol=1e-6)
    np.testing.assert_allclose(jax.grad(weighted(own))(x), jax.grad(weighted(plain))(x), atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("device", [Device("cpu"), Device("cuda", (9, 0))], ids=["cpu", "gpu"])
def test_layer_norm_value_and_gradients(device):
    arguments = (jnp.asarray(X), jnp.asarray(SCALE), jnp.asarray(BIAS))
    execution = Execution.for_device(device, jnp.dtype("float32"))

    def own(x, scale, bias):
        return layer_norm(x, scale, bias, 1e-5, execution)

    def plain(x, scale, bias):
        return plain_layer_norm(x, scale, bias, 1e-5)

    np.testing.assert_allclose(own(*arguments), plain(*arguments), atol=1e-5)
    own_grads = jax.grad(weighted(own), argnums=(0, 1, 2))(*arguments)
    for mine, theirs in zip(own_grads, jax.grad(weighted(plain), argnums=(0, 1, 2))(*arguments), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_layer_saves_two_arrays_of_the_mlp_width(name):
    ids = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    precision = Precision.for_device(name)

    def residuals(params, ids):
        return jax.vjp(lambda p: hidden_states(p, TINY, ids, precision=precision), params)[1]

    leaves = jax.tree.leaves(jax.eval_shape(residuals, abstract_params(TINY), ids))
    rows = [leaf for leaf in leaves if leaf.shape == (TINY.n_layer, 2, 16, TINY.mlp_dim)]
    # the derivative of GELU and the operand of the second product; 16 bits as uint16
    residual_dtype = {"float32": jnp.float32, "bfloat16": jnp.uint16}[name]
    assert [leaf.dtype for leaf in rows] == [residual_dtype] * 2
