"""Attention in blocks of queries, with its own gradient, against the whole softmax and automatic differentiation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2jax.ops.attention import (
    MASKED,
    LayerCache,
    attention,
    block_mask,
    causal_mask,
    query_blocks,
)
from gpt2jax.ops.device import Device, Execution
from gpt2jax.ops.dropout import dropout

FLOAT32 = jnp.dtype("float32")
ON_CPU = Execution.for_device(Device("cpu"), FLOAT32)
ON_GPU = Execution.for_device(Device("cuda", (7, 5)), FLOAT32, attention_block=32)
QUERY_BLOCK = ON_CPU.attention_block


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
def test_blockwise_attention_equals_plain_softmax(length, dtype, tolerance):
    q, k, v, g = (jax.random.normal(key, (2, 2, length, 8)) for key in jax.random.split(jax.random.key(0), 4))
    causal = causal_mask(length)
    ours, pull = jax.vjp(
        lambda q, k, v: attention(q, k, v, causal, dtype=jnp.dtype(dtype), is_causal=True, execution=ON_CPU),
        q,
        k,
        v,
    )
    whole, pull_whole = jax.vjp(lambda q, k, v: plain(q, k, v, causal), q, k, v)
    np.testing.assert_allclose(ours, whole, atol=tolerance)
    for mine, theirs in zip(pull(g), pull_whole(g), strict=True):
        assert mine.dtype == jnp.float32
        np.testing.assert_allclose(mine, theirs, atol=2 * tolerance)


def test_blockwise_attention_saves_nothing_of_t_times_t():
    x = jax.ShapeDtypeStruct((1, 2, 300, 8), jnp.float32)

    def residuals(q, k, v):
        return jax.vjp(
            lambda q, k, v: attention(
                q, k, v, causal_mask(300), dtype=FLOAT32, is_causal=True, execution=ON_CPU
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


@pytest.mark.slow
@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("drops", [False, True])
def test_blockwise_attention_with_dropout_and_segments(segments, drops):
    """Values and gradients are those of automatic differentiation through the same masks, drawn again by block."""
    q, k, v, g = (jax.random.normal(key, (2, 2, 70, 8)) for key in jax.random.split(jax.random.key(2), 4))
    ids = jnp.asarray(np.repeat([[0, 1, 2], [0, 0, 1]], [30, 25, 15], axis=1)) if segments else None
    key = jax.random.key(7) if drops else None
    rate = 0.25 if drops else 0.0
    mask = block_mask(0, 70, ids)

    def kept(shape):
        blocks = []
        for begin, end in query_blocks(70, 32):
            ones = jnp.ones((*shape[:2], end - begin, end))
            some = dropout(ones, rate, None if key is None else jax.random.fold_in(key, begin))
            blocks.append(jnp.pad(some, ((0, 0), (0, 0), (0, 0), (0, 70 - end))))
        return jnp.concatenate(blocks, axis=2)

    def whole(q, k, v):
        scores = jnp.einsum("bnth,bnsh->bnts", q, k, precision="highest")
        p = jax.nn.softmax(jnp.where(mask, scores, MASKED), axis=-1) * kept(scores.shape)
        return jnp.einsum("bnts,bnsh->bnth", p, v, precision="highest")

    def ours(q, k, v):
        given = {"dtype": FLOAT32, "is_causal": True, "segment_ids": ids, "execution": ON_GPU}
        return attention(q, k, v, mask, dropout_rate=rate, dropout_key=key, **given)

    y, pull = jax.vjp(ours, q, k, v)
    expected, pull_expected = jax.vjp(whole, q, k, v)
    np.testing.assert_allclose(y, expected, atol=2e-5)
    for mine, theirs in zip(pull(g), pull_expected(g), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=5e-5)
    shapes = [
        leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(lambda *x: jax.vjp(ours, *x)[1], q, k, v))
    ]
    assert all(shape[-2:] != (70, 70) for shape in shapes)


def test_blockwise_attention_is_computed_again_where_layers_are_written_out():
    """A barrier keeps XLA from merging the backward pass with the forward pass; a loop on a CPU needs none."""
    x = jnp.ones((1, 1, 40, 4))

    def loss(x, execution):
        given = {"dtype": FLOAT32, "is_causal": True, "execution": execution}
        key = jax.random.key(0) if execution.blocks_masked_attention else None
        return attention(x, x, x, causal_mask(40), dropout_rate=0.1, dropout_key=key, **given).sum()

    programs = [str(jax.make_jaxpr(jax.grad(lambda x, e=e: loss(x, e)))(x)) for e in (ON_CPU, ON_GPU)]
    assert [text.count("optimization_barrier") for text in programs] == [0, 1]
