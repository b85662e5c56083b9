"""The dtypes that a backend gets, and the model in 16 bits throughout."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import TINY, random_params

from gpt2jax.model.gpt2 import hidden_states, lm_head_weight
from gpt2jax.ops.cross_entropy import cross_entropy
from gpt2jax.ops.device import Device
from gpt2jax.ops.precision import FLOAT32, Precision


def relative(ours: jax.Array, exact: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(ours, np.float64) - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize(
    ("name", "backend", "activations"),
    [
        ("float32", "cpu", "float32"),
        ("float32", "gpu", "float32"),
        ("bfloat16", "cpu", "float32"),
        ("bfloat16", "gpu", "bfloat16"),
        ("float16", "cpu", "float32"),
        ("float16", "tpu", "float16"),
    ],
)
def test_for_device_activations_are_16_bit_on_accelerators_only(name, backend, activations):
    precision = Precision.for_device(name, Device.of_backend(backend))
    assert precision.compute_dtype == name and precision.activation_dtype == activations


def test_for_device_unknown_dtype():
    with pytest.raises(
        ValueError, match="compute_dtype must be one of float32, tensorfloat32, bfloat16, float16, got 'int8'"
    ):
        Precision.for_device("int8")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tolerance"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_model_and_gradient_with_16_bit_activations(name, tolerance):
    """What an accelerator computes, computed here."""
    params = random_params(noise=0.1)
    tokens = np.random.default_rng(1).integers(0, TINY.vocab_size, (2, 33))
    inputs, targets = jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:])

    def loss(params, precision):
        hidden = hidden_states(params, TINY, inputs, precision=precision)
        assert hidden.dtype == precision.activation_dtype
        return (
            cross_entropy(hidden, lm_head_weight(params), targets, jnp.ones(targets.shape), precision)[0] / 64
        )

    gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    value, reduced = gradient(
        params, Precision.for_device(name, Device.of_backend("gpu"), attention="blockwise")
    )
    expected, exact = gradient(params, FLOAT32)
    assert value.dtype == jnp.float32 and abs(value - expected) < tolerance * expected
    for path, leaf in jax.tree_util.tree_leaves_with_path(reduced):
        reference = exact
        for key in path:
            reference = reference[key.key]
        assert leaf.dtype == jnp.float32
        assert relative(leaf, np.asarray(reference, np.float64)) < tolerance, jax.tree_util.keystr(path)
