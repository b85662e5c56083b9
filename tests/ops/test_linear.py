"""`matmul` with every stored form of a kernel, beside float64 products of the same rounded operands."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpt2jax
from gpt2jax.generation.cached_model import (
    decoding_precision,
    forward_with_cache,
    lm_head,
    prepare_decoding_params,
)
from gpt2jax.generation.kv_cache import init_cache
from gpt2jax.ops.cross_entropy import cross_entropy
from gpt2jax.ops.device import Device
from gpt2jax.ops.linear import (
    bitcast_kernel,
    dequantize,
    matmul,
    outer_product_sum,
    quantize_kernel,
    transpose_kernel,
)
from gpt2jax.ops.precision import Precision, bitcast_from_uint16, bitcast_to_uint16

OPERANDS = ("float32", "bfloat16", "float16")


def round_to(x: jax.Array, dtype: jnp.dtype) -> np.ndarray:
    return np.asarray(x.astype(dtype), np.float64)


def relative_error(ours: jax.Array, exact: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(ours, np.float64) - exact) / np.linalg.norm(exact))


@pytest.fixture(scope="module")
def operands() -> tuple[jax.Array, jax.Array, jax.Array]:
    """x [2, 64, 96], w [96, 80], cotangent [2, 64, 80]: so large that the CPU backend takes its fast kernels."""
    generator = np.random.default_rng(0)
    shapes = ((2, 64, 96), (96, 80), (2, 64, 80))
    x, w, g = (jnp.asarray(generator.normal(size=shape), jnp.float32) for shape in shapes)
    return x, w, g


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERANDS)
def test_matmul_rounds_operands_and_nothing_else(operands, name):
    x, w, g = operands
    dtype = jnp.dtype(name)
    y, pullback = jax.vjp(lambda x, w: matmul(x, w, dtype), x, w)
    dx, dw = pullback(g)
    assert y.dtype == dx.dtype == dw.dtype == jnp.float32
    x64, w64, g64 = (round_to(array, dtype) for array in operands)
    assert relative_error(y, x64 @ w64) < 1e-6
    assert relative_error(dx, g64 @ w64.T) < 1e-6
    assert relative_error(dw, np.einsum("btk,btm->km", x64, g64)) < 1e-6
    if name != "float32":
        assert relative_error(y, np.asarray(x, np.float64) @ np.asarray(w, np.float64)) > 1e-5


def test_matmul_backward_products_have_16_bit_operands(operands):
    x, w, _ = operands
    gradient = jax.value_and_grad(lambda x, w: matmul(x, w, jnp.dtype("bfloat16")).sum(), argnums=(0, 1))
    text = jax.jit(gradient).lower(x, w).as_text()
    products = re.findall(r"stablehlo.dot_general .* : \((.*)\) ->", text)
    assert len(products) == 3
    assert all(re.findall(r"x([a-z]+[0-9]+)>", operands) == ["bf16", "bf16"] for operands in products)


@pytest.mark.parametrize("shape", [(96,), (1, 96), (1, 1, 96)])
def test_matmul_of_one_row(operands, shape):
    x, w, _ = operands
    dtype = jnp.dtype("bfloat16")
    y = matmul(x[0, 0].reshape(shape), w, dtype)
    assert y.shape == (*shape[:-1], 80)
    assert relative_error(y.reshape(-1), round_to(x[0, 0], dtype) @ round_to(w, dtype)) < 1e-6


def test_matmul_saves_a_16_bit_kernel_as_it_is():
    """Products in float32 with weights in 16 bits: a float32 copy would be twice the base."""
    x, w = jnp.ones((4, 8)), jnp.ones((8, 6), jnp.bfloat16)
    _, pull = jax.vjp(lambda x: matmul(x, w, jnp.dtype("float32")), x)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(pull) if leaf.shape == w.shape} == {"bfloat16"}


@pytest.mark.parametrize("shape", [(6,), (5,), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_outer_product_sum_over_any_rows(shape, name):
    generator = np.random.default_rng(1)
    a, b = (jnp.asarray(generator.integers(-4, 4, (*shape, width)), name) for width in (7, 9))
    want = np.asarray(a, np.float64).reshape(-1, 7).T @ np.asarray(b, np.float64).reshape(-1, 9)
    np.testing.assert_array_equal(outer_product_sum(a, b, jnp.dtype(name)), want)


# ---- BitcastKernel ----

LAYERS, ROWS, DIM, VOCABULARY = 3, 64, 128, 512


@pytest.fixture(scope="module")
def kernels():
    return jax.random.normal(jax.random.key(0), (LAYERS, DIM, DIM)).astype(jnp.bfloat16)


def scan_matmul(x, kernels, dtype=jnp.bfloat16):
    return jax.lax.scan(lambda x, kernel: (jnp.tanh(matmul(x, kernel, jnp.dtype(dtype))), None), x, kernels)[
        0
    ]


def upcasts(compiled: str, shape: tuple[int, ...]) -> list[str]:
    """Conversions to float32 of a whole array of this shape."""
    return re.findall(rf"f32\[{','.join(map(str, shape))}\]\S* convert\(", compiled)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_bitcast_round_trip_is_exact(dtype):
    x = jnp.asarray([0.0, -0.0, 1.5, -3e-5, jnp.inf], dtype)
    assert bitcast_to_uint16(x).dtype == ("float32" if dtype == "float32" else "uint16")
    np.testing.assert_array_equal(bitcast_from_uint16(bitcast_to_uint16(x), x.dtype), x)
    np.testing.assert_array_equal(dequantize(bitcast_kernel(x[:, None]))[:, 0], x.astype(jnp.float32))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bitcast_kernel_products_and_gradients_are_those_of_the_array(kernels, dtype):
    x = jax.random.normal(jax.random.key(1), (ROWS, DIM))

    def value(x, kernels):
        return (scan_matmul(x, kernels, dtype) ** 2).sum()

    for take in (lambda f: f, jax.grad):
        plain, bits = (jax.jit(take(value))(x, k) for k in (kernels, bitcast_kernel(kernels)))
        np.testing.assert_allclose(bits, plain, rtol=1e-5)


def test_bitcast_kernel_is_not_upcast_by_a_scan(kernels):
    compiled = jax.jit(scan_matmul).lower(jnp.ones((ROWS, DIM)), bitcast_kernel(kernels)).compile().as_text()
    assert compiled is not None and f"f32[{LAYERS},{DIM},{DIM}]" not in compiled


def test_cross_entropy_upcasts_no_operand():
    hidden, head = jnp.ones((ROWS, DIM)), jnp.ones((VOCABULARY, DIM))
    targets, weights = jnp.zeros(ROWS, jnp.int32), jnp.ones(ROWS)

    def loss(hidden, head):
        return cross_entropy(hidden, head, targets, weights, Precision.for_device("bfloat16"))[0]

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, head).compile().as_text()
    assert compiled is not None and f"bf16[{VOCABULARY},{DIM}]" in compiled
    for shape in (
        (VOCABULARY, DIM),
        (ROWS, VOCABULARY),
        (ROWS, DIM),
    ):  # head, gradient of logits, hidden states
        assert not upcasts(compiled, shape)


# ---- Int8Kernel ----


def test_quantize_kernel_rounds_each_channel_within_half_a_step():
    generator = np.random.default_rng(0)
    kernel = generator.normal(0, [[0.01, 1.0, 30.0, 0.0]], (3, 50, 4)).astype(np.float32)
    found = quantize_kernel(jnp.asarray(kernel))
    assert found.values.dtype == jnp.int8 and found.scale.shape == (3, 1, 4)
    back = np.asarray(dequantize(found), np.float64)
    assert (np.abs(back - kernel) <= np.asarray(found.scale) * 0.5001).all()
    np.testing.assert_allclose(np.abs(back).max(1), np.abs(kernel).max(1), rtol=1e-6)
    np.testing.assert_allclose(found.scale[:, 0, :3], np.abs(kernel).max(1)[:, :3] / 127, rtol=1e-6)


@pytest.mark.parametrize("dtype", OPERANDS)
def test_int8_kernel_product_and_gradient_round_operands_and_nothing_else(dtype):
    generator = np.random.default_rng(1)
    x, kernel, g = (
        jnp.asarray(generator.normal(0, size, shape), jnp.float32)
        for size, shape in ((3, (2, 5, 64)), (0.1, (64, 40)), (1e-4, (2, 5, 40)))
    )
    weight, operand = quantize_kernel(kernel), jnp.dtype(dtype)
    y, pull = jax.vjp(lambda x: matmul(x, weight, operand), x)
    (dx,) = jax.jit(pull)(g)
    dense = np.asarray(weight.values, np.float64) * np.asarray(weight.scale)
    exact = np.asarray(x.astype(operand), np.float64) @ dense
    np.testing.assert_allclose(y, exact, atol=1e-6 * np.abs(exact).max())
    assert y.dtype == dx.dtype == jnp.float32
    # the cotangent is rounded once more; in float16 the smallest would be zeros in units of the weights' own
    exact = np.asarray(g, np.float64) @ dense.T
    tolerance = {"float32": 1e-6, "bfloat16": 5e-3, "float16": 3e-3}[dtype]
    np.testing.assert_allclose(dx, exact, atol=tolerance * np.abs(exact).max())


# ---- TransposedKernel ----


def multiply(x, kernel):
    """`matmul`; the kernel knows its dtype, whatever is asked for."""
    return matmul(x, kernel, jnp.dtype("float32"))


def test_transpose_kernel_int8_rounds_each_channel_within_half_a_step():
    kernel = np.random.default_rng(0).normal(0, [[0.01, 1.0, 30.0, 0.0]], (50, 4)).astype(np.float32)
    found = transpose_kernel(jnp.asarray(kernel.T), jnp.dtype("int8"))
    assert found.scale is not None
    assert found.values.dtype == jnp.int8 and found.scale.shape == (4,)
    back = np.asarray(dequantize(found), np.float64)
    assert (np.abs(back - kernel) <= np.asarray(found.scale) * 0.5001).all()
    np.testing.assert_allclose(np.abs(back).max(0), np.abs(kernel).max(0), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 64), (3, 64), (2, 5, 64)])
def test_transposed_kernel_int8_product_is_exact_except_for_the_roundings(shape):
    rng = np.random.default_rng(1)
    x, kernel = rng.normal(0, 3, shape).astype(np.float32), rng.normal(0, 0.1, (64, 40)).astype(np.float32)
    found = transpose_kernel(jnp.asarray(kernel.T), jnp.dtype("int8"))
    scale = np.abs(x).max(-1, keepdims=True).astype(np.float64) / 127
    want = np.rint(x / scale) * scale @ (np.asarray(found.values, np.float64).T * np.asarray(found.scale))
    got = jax.jit(multiply)(x, found)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert np.abs(got - x @ kernel).max() < 0.03 * np.abs(x @ kernel).max()
    assert not np.asarray(multiply(jnp.zeros(shape), found)).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 5, 64)])
def test_transposed_kernel_product_rounds_operands_and_nothing_else(shape, dtype):
    rng = np.random.default_rng(2)
    x, kernel = rng.normal(0, 3, shape).astype(np.float32), rng.normal(0, 0.1, (64, 40)).astype(np.float32)
    got = jax.jit(multiply)(x, transpose_kernel(jnp.asarray(kernel.T), jnp.dtype(dtype)))
    operands = (np.asarray(jnp.asarray(each).astype(dtype), np.float64) for each in (x, kernel))
    want = np.matmul(*operands)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_int8_decoding_loss_of_gpt2_mini_within_0_02():
    """On the documents that the default job holds out."""
    model = gpt2jax.load("gpt2-mini")
    texts = gpt2jax.load_texts("python-docs", split="validation")[:24]
    assert model.tokenizer is not None
    rows = [[model.end_token_id, *model.tokenizer.encode(text)][:256] for text in texts]
    tokens = np.array([row for row in rows if len(row) == 256], np.int32)
    assert len(tokens) >= 4

    def loss(dtype):
        precision = decoding_precision(dtype, device=Device.of_backend("cpu"))
        params = prepare_decoding_params(model.params, model.config, dtype=dtype)

        @jax.jit
        def run(params, tokens):
            cache = init_cache(model.config, len(tokens), 256, jnp.float32)
            padding = jnp.zeros(len(tokens), jnp.int32)
            hidden, _ = forward_with_cache(params, model.config, tokens, cache, 0, padding, precision)
            logprobs = jax.nn.log_softmax(lm_head(params, hidden[:, :-1], precision))
            return -jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1).mean()

        return float(run(params, tokens))

    exact, int8 = loss("float32"), loss("int8")
    assert exact < 4
    assert 0 < abs(int8 - exact) < 0.02
