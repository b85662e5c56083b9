"""Products with streamed weights; of one byte: the two roundings, exact sums between them, and what they cost."""

from __future__ import annotations

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
from gpt2jax.ops.streamed import transpose_kernel, transposed_matmul


def test_a_channel_keeps_its_largest_number_and_the_rest_within_half_a_step():
    kernel = np.random.default_rng(0).normal(0, [[0.01, 1.0, 30.0, 0.0]], (50, 4)).astype(np.float32)
    found = transpose_kernel(jnp.asarray(kernel.T), jnp.dtype("int8"))
    assert found.scale is not None
    assert found.values.dtype == jnp.int8 and found.scale.shape == (4,)
    back = np.asarray(found.values, np.float64).T * np.asarray(found.scale)
    assert (np.abs(back - kernel) <= np.asarray(found.scale) * 0.5001).all()
    np.testing.assert_allclose(np.abs(back).max(0), np.abs(kernel).max(0), rtol=1e-6)


@pytest.mark.parametrize("shape", [(1, 64), (3, 64), (2, 5, 64)])
def test_products_are_exact_but_for_the_roundings(shape):
    rng = np.random.default_rng(1)
    x, kernel = rng.normal(0, 3, shape).astype(np.float32), rng.normal(0, 0.1, (64, 40)).astype(np.float32)
    found = transpose_kernel(jnp.asarray(kernel.T), jnp.dtype("int8"))
    scale = np.abs(x).max(-1, keepdims=True).astype(np.float64) / 127
    want = np.rint(x / scale) * scale @ (np.asarray(found.values, np.float64).T * np.asarray(found.scale))
    got = jax.jit(transposed_matmul)(x, found)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert np.abs(got - x @ kernel).max() < 0.03 * np.abs(x @ kernel).max()
    assert not np.asarray(transposed_matmul(jnp.zeros(shape), found)).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 5, 64)])
def test_products_of_rounded_operands(shape, dtype):
    rng = np.random.default_rng(2)
    x, kernel = rng.normal(0, 3, shape).astype(np.float32), rng.normal(0, 0.1, (64, 40)).astype(np.float32)
    got = jax.jit(transposed_matmul)(x, transpose_kernel(jnp.asarray(kernel.T), jnp.dtype(dtype)))
    operands = (np.asarray(jnp.asarray(each).astype(dtype), np.float64) for each in (x, kernel))
    want = np.matmul(*operands)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_loss_of_the_packaged_model_stays_within_two_hundredths():
    """On the documents that the default job holds out."""
    model = gpt2jax.load("gpt2-mini")
    texts = gpt2jax.load_texts("python-docs", split="validation")[:24]
    assert model.tokenizer is not None
    rows = [[model.end_token_id, *model.tokenizer.encode(text)][:256] for text in texts]
    tokens = np.array([row for row in rows if len(row) == 256], np.int32)
    assert len(tokens) >= 4

    def loss(dtype):
        precision = decoding_precision(dtype, backend="cpu")
        params = prepare_decoding_params(model.params, model.config, dtype=dtype)

        @jax.jit
        def run(params, tokens):
            cache = init_cache(model.config, len(tokens), 256, jnp.float32)
            padding = jnp.zeros(len(tokens), jnp.int32)
            hidden, _ = forward_with_cache(params, model.config, tokens, cache, 0, padding, precision)
            logprobs = jax.nn.log_softmax(lm_head(params, hidden[:, :-1], precision))
            return -jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1).mean()

        return float(run(params, tokens))

    exact, narrow = loss("float32"), loss("int8")
    assert exact < 4
    assert 0 < abs(narrow - exact) < 0.02
