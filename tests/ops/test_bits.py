"""16-bit floats as bits: the same numbers, and no wide copies in what XLA compiles for a CPU."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2jax.ops.bits import bitcast_from_uint16, bitcast_kernel, bitcast_to_uint16
from gpt2jax.ops.cross_entropy import cross_entropy
from gpt2jax.ops.precision import Precision, matmul

LAYERS, ROWS, DIM, VOCABULARY = 3, 64, 128, 512


@pytest.fixture(scope="module")
def kernels():
    return jax.random.normal(jax.random.key(0), (LAYERS, DIM, DIM)).astype(jnp.bfloat16)


def through(x, kernels, dtype=jnp.bfloat16):
    return jax.lax.scan(lambda x, kernel: (jnp.tanh(matmul(x, kernel, jnp.dtype(dtype))), None), x, kernels)[
        0
    ]


def wide_copies(compiled: str, shape: tuple[int, ...]) -> list[str]:
    """Conversions to float32 of a whole array of this shape."""
    return re.findall(rf"f32\[{','.join(map(str, shape))}\]\S* convert\(", compiled)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_bits_are_read_as_what_they_were(dtype):
    x = jnp.asarray([0.0, -0.0, 1.5, -3e-5, jnp.inf], dtype)
    assert bitcast_to_uint16(x).dtype == ("float32" if dtype == "float32" else "uint16")
    np.testing.assert_array_equal(bitcast_from_uint16(bitcast_to_uint16(x), x.dtype), x)
    np.testing.assert_array_equal(bitcast_kernel(x).astype("float32"), x.astype(jnp.float32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_and_their_gradients_are_the_plain_ones(kernels, dtype):
    x = jax.random.normal(jax.random.key(1), (ROWS, DIM))

    def value(x, kernels):
        return (through(x, kernels, dtype) ** 2).sum()

    for take in (lambda f: f, jax.grad):
        plain, bits = (jax.jit(take(value))(x, k) for k in (kernels, bitcast_kernel(kernels)))
        np.testing.assert_allclose(bits, plain, rtol=1e-5)


def test_a_loop_over_bits_widens_nothing(kernels):
    compiled = jax.jit(through).lower(jnp.ones((ROWS, DIM)), bitcast_kernel(kernels)).compile().as_text()
    assert f"f32[{LAYERS},{DIM},{DIM}]" not in compiled


def test_the_losss_products_are_narrow():
    hidden, head = jnp.ones((ROWS, DIM)), jnp.ones((VOCABULARY, DIM))
    targets, weights = jnp.zeros(ROWS, jnp.int32), jnp.ones(ROWS)

    def loss(hidden, head):
        return cross_entropy(hidden, head, targets, weights, Precision.for_backend("bfloat16"))[0]

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, head).compile().as_text()
    assert f"bf16[{VOCABULARY},{DIM}]" in compiled
    for shape in (
        (VOCABULARY, DIM),
        (ROWS, VOCABULARY),
        (ROWS, DIM),
    ):  # head, gradient of logits, hidden states
        assert not wide_copies(compiled, shape)
