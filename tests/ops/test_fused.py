"""GELU and LayerNorm with gradients of their own: against automatic differentiation, and what is kept."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2jax.model.gpt2 import abstract_params, hidden_states
from gpt2jax.ops.fused import gelu_tanh, layer_norm
from gpt2jax.ops.precision import Precision
from tests.tiny_models import TINY

X = np.random.default_rng(0).normal(0.3, 2.0, (5, 7, 16)).astype(np.float32)
SCALE, BIAS = np.random.default_rng(1).normal(1.0, 0.3, (2, 16)).astype(np.float32)


def plain_layer_norm(x, scale, bias, epsilon):
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon) * scale + bias


def weighted(function):
    """A scalar whose gradient needs every element of what `function` gives."""
    return lambda *args: (function(*args) * jnp.cos(jnp.arange(X.size).reshape(X.shape))).sum()


def test_gelu_and_its_gradient():
    own, plain = lambda x: gelu_tanh(x, jnp.dtype("float32")), jax.nn.gelu
    x = jnp.concatenate([X.ravel()[:-4], jnp.array([-40.0, -5.0, 0.0, 40.0])]).reshape(X.shape)
    np.testing.assert_allclose(own(x), plain(x), atol=1e-6)
    np.testing.assert_allclose(jax.grad(weighted(own))(x), jax.grad(weighted(plain))(x), atol=2e-6)


def test_layer_norm_and_its_gradients():
    arguments = (jnp.asarray(X), jnp.asarray(SCALE), jnp.asarray(BIAS))
    own, plain = (lambda *a, f=f: f(*a, 1e-5) for f in (layer_norm, plain_layer_norm))
    np.testing.assert_allclose(own(*arguments), plain(*arguments), atol=1e-5)
    own_grads = jax.grad(weighted(own), argnums=(0, 1, 2))(*arguments)
    for mine, theirs in zip(own_grads, jax.grad(weighted(plain), argnums=(0, 1, 2))(*arguments), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "wide"), [("float32", 2), ("bfloat16", 2)])
def test_a_layer_keeps_two_arrays_of_the_mlps_width(name, wide):
    ids = jax.ShapeDtypeStruct((2, 16), jnp.int32)

    def kept(params, ids):
        return jax.vjp(lambda p: hidden_states(p, TINY, ids, precision=Precision.for_backend(name)), params)[
            1
        ]

    leaves = jax.tree.leaves(jax.eval_shape(kept, abstract_params(TINY), ids))
    rows = [leaf for leaf in leaves if leaf.shape == (TINY.n_layer, 2, 16, TINY.mlp_dim)]
    # GELU's derivative and the second product's operand
    kept_dtype = {"float32": jnp.float32, "bfloat16": jnp.uint16}[name]  # as bits: see precision.to_bits
    assert [leaf.dtype for leaf in rows] == [kept_dtype] * wide
