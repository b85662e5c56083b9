"""Attention in blocks of queries, with its own gradient, against the whole softmax and automatic differentiation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2jax.ops.attention import MASKED, QUERY_BLOCK, causal_mask, memory_efficient_attention


def plain(q, k, v, causal):
    scores = jnp.einsum("bnth,bnsh->bnts", q, k, precision="highest")
    probabilities = jax.nn.softmax(jnp.where(causal, scores, MASKED), axis=-1)
    return jnp.einsum("bnts,bnsh->bnth", probabilities, v, precision="highest")


@pytest.mark.parametrize(
    ("length", "dtype", "tolerance"),
    [
        (7, "float32", 2e-5),
        (QUERY_BLOCK, "float32", 2e-5),
        (2 * QUERY_BLOCK + 3, "float32", 2e-5),
        (QUERY_BLOCK + 5, "bfloat16", 3e-2),
    ],
)
def test_blocks_of_queries_are_the_whole(length, dtype, tolerance):
    q, k, v, g = (jax.random.normal(key, (2, 2, length, 8)) for key in jax.random.split(jax.random.key(0), 4))
    causal = causal_mask(length)
    lean, pull = jax.vjp(
        lambda *x: memory_efficient_attention(*x, causal, jnp.dtype(dtype), "recompute"), q, k, v
    )
    whole, pull_whole = jax.vjp(lambda *x: plain(*x, causal), q, k, v)
    np.testing.assert_allclose(lean, whole, atol=tolerance)
    for mine, theirs in zip(pull(g), pull_whole(g), strict=True):
        assert mine.dtype == jnp.float32
        np.testing.assert_allclose(mine, theirs, atol=2 * tolerance)


def test_nothing_of_length_times_length_is_kept():
    x = jax.ShapeDtypeStruct((1, 2, 300, 8), jnp.float32)

    def kept(q, k, v):
        return jax.vjp(
            lambda *x: memory_efficient_attention(*x, causal_mask(300), jnp.dtype("float32"), "recompute"),
            q,
            k,
            v,
        )[1]

    shapes = [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(kept, x, x, x))]
    assert shapes.count(x.shape) == 3
    assert (1, 2, 300, 300) not in shapes
