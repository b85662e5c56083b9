"""Products in narrow dtypes beside float64 products of the same rounded operands."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import TINY, random_params

from gpt2jax.model.gpt2 import hidden_states, lm_head_weight
from gpt2jax.ops.cross_entropy import cross_entropy
from gpt2jax.ops.precision import COMPUTE_DTYPES, FLOAT32, Precision, matmul


def rounded(x: jax.Array, dtype: jnp.dtype) -> np.ndarray:
    return np.asarray(x.astype(dtype), np.float64)


def relative(ours: jax.Array, exact: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(ours, np.float64) - exact) / np.linalg.norm(exact))


@pytest.fixture(scope="module")
def operands() -> tuple[jax.Array, jax.Array, jax.Array]:
    """x [2, 64, 96], w [96, 80], cotangent [2, 64, 80]: so large that the CPU backend takes its fast kernels."""
    generator = np.random.default_rng(0)
    shapes = ((2, 64, 96), (96, 80), (2, 64, 80))
    x, w, g = (jnp.asarray(generator.normal(size=shape), jnp.float32) for shape in shapes)
    return x, w, g


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
def test_activations_are_narrow_on_accelerators_only(name, backend, activations):
    precision = Precision.for_backend(name, backend=backend)
    assert precision.compute_dtype == name and precision.activation_dtype == activations


def test_unknown_dtype():
    with pytest.raises(
        ValueError, match="compute_dtype='int8' is not known; known: float32, bfloat16, float16"
    ):
        Precision.for_backend("int8")


@pytest.mark.parametrize("name", COMPUTE_DTYPES)
def test_product_and_gradient_round_operands_and_nothing_else(operands, name):
    x, w, g = operands
    dtype = jnp.dtype(name)
    y, pullback = jax.vjp(lambda x, w: matmul(x, w, dtype), x, w)
    dx, dw = pullback(g)
    assert y.dtype == dx.dtype == dw.dtype == jnp.float32
    x64, w64, g64 = (rounded(array, dtype) for array in operands)
    assert relative(y, x64 @ w64) < 1e-6
    assert relative(dx, g64 @ w64.T) < 1e-6
    assert relative(dw, np.einsum("btk,btm->km", x64, g64)) < 1e-6
    if name != "float32":
        assert relative(y, np.asarray(x, np.float64) @ np.asarray(w, np.float64)) > 1e-5


def test_backward_products_are_narrow_too(operands):
    x, w, _ = operands
    gradient = jax.grad(lambda x, w: matmul(x, w, jnp.dtype("bfloat16")).sum(), argnums=(0, 1))
    equations = jax.make_jaxpr(gradient)(x, w).eqns
    products = [equation for equation in equations if equation.primitive.name == "dot_general"]
    assert len(products) == 3
    assert {operand.aval.dtype.name for product in products for operand in product.invars} == {"bfloat16"}


@pytest.mark.parametrize("shape", [(96,), (1, 96), (1, 1, 96)])
def test_one_row_is_the_row_of_many(operands, shape):
    x, w, _ = operands
    dtype = jnp.dtype("bfloat16")
    y = matmul(x[0, 0].reshape(shape), w, dtype)
    assert y.shape == (*shape[:-1], 80)
    assert relative(y.reshape(-1), rounded(x[0, 0], dtype) @ rounded(w, dtype)) < 1e-6


@pytest.mark.parametrize(("name", "tolerance"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_model_and_gradient_with_narrow_activations(name, tolerance):
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
    value, narrow = gradient(
        params, dataclasses.replace(Precision.for_backend(name, backend="gpu"), attention="recompute")
    )
    expected, exact = gradient(params, FLOAT32)
    assert value.dtype == jnp.float32 and abs(value - expected) < tolerance * expected
    for path, leaf in jax.tree_util.tree_leaves_with_path(narrow):
        reference = exact
        for key in path:
            reference = reference[key.key]
        assert leaf.dtype == jnp.float32
        assert relative(leaf, np.asarray(reference, np.float64)) < tolerance, jax.tree_util.keystr(path)
