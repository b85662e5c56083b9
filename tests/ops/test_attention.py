"""Attention in blocks of queries, with its own gradient, against the whole softmax and automatic differentiation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2jax.ops.attention import (
    MASKED,
    QUERY_BLOCK,
    LayerCache,
    attention,
    causal_mask,
    memory_efficient_attention,
)


def plain(q, k, v, causal):
    scores = jnp.einsum("bnth,bnsh->bnts", q, k, precision="highest")
    probabilities = jax.nn.softmax(jnp.where(causal, scores, MASKED), axis=-1)
    return jnp.einsum("bnts,bnsh->bnth", probabilities, v, precision="highest")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "dtype", "tolerance"),
    [
        (7, "float32", 2e-5),
        (QUERY_BLOCK, "float32", 2e-5),
        (2 * QUERY_BLOCK + 3, "float32", 2e-5),
        (QUERY_BLOCK + 5, "bfloat16", 3e-2),
    ],
)
def test_memory_efficient_attention_equals_plain_softmax(length, dtype, tolerance):
    q, k, v, g = (jax.random.normal(key, (2, 2, length, 8)) for key in jax.random.split(jax.random.key(0), 4))
    causal = causal_mask(length)
    ours, pull = jax.vjp(
        lambda q, k, v: memory_efficient_attention(q, k, v, causal, jnp.dtype(dtype), "recompute"), q, k, v
    )
    whole, pull_whole = jax.vjp(lambda q, k, v: plain(q, k, v, causal), q, k, v)
    np.testing.assert_allclose(ours, whole, atol=tolerance)
    for mine, theirs in zip(pull(g), pull_whole(g), strict=True):
        assert mine.dtype == jnp.float32
        np.testing.assert_allclose(mine, theirs, atol=2 * tolerance)


def test_memory_efficient_attention_saves_nothing_of_t_times_t():
    x = jax.ShapeDtypeStruct((1, 2, 300, 8), jnp.float32)

    def residuals(q, k, v):
        return jax.vjp(
            lambda q, k, v: memory_efficient_attention(
                q, k, v, causal_mask(300), jnp.dtype("float32"), "recompute"
            ),
            q,
            k,
            v,
        )[1]

    shapes = [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(residuals, x, x, x))]
    assert shapes.count(x.shape) == 3
    assert (1, 2, 300, 300) not in shapes


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2])
def test_attention_over_a_cache_equals_attention_without(batch):
    q, k, v = (jax.random.normal(key, (batch, 3, 5, 4)) for key in jax.random.split(jax.random.key(1), 3))
    cache = LayerCache(*(jnp.zeros((batch * 3, 8, 4)) for _ in range(2))).update(k, v, 2)
    assert not cache.keys[:, :2].any() and not cache.values[:, 7:].any()
    mask = jnp.pad(causal_mask(5), ((0, 0), (0, 0), (0, 0), (2, 1)))
    dtype = jnp.dtype("float32")
    expected = attention(q, k, v, causal_mask(5), dtype=dtype)
    np.testing.assert_allclose(attention(q, *cache, mask, dtype=dtype), expected, atol=1e-6)


@pytest.mark.slow
def test_attention_of_a_masked_row_is_finite():
    x = jnp.ones((1, 1, 2, 4))
    mask = jnp.asarray([[[[True, False], [False, False]]]])
    gradient = jax.grad(lambda q: attention(q, x, x, mask, dtype=jnp.dtype("float32")).sum())(x)
    assert np.isfinite(gradient).all()
