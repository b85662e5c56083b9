"""Dropout masks from a counter: the generator, the statistics of a mask, and that tiles fit together."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32 as of_jax

from gpt2jax.ops.counter_dropout import dropout_mask, dropout_seed, kept_scale, kept_tile, threefry_2x32

SHAPE = (2, 3, 256)


@pytest.fixture(scope="module")
def masks():
    """Masks of two keys, True = kept."""
    draw = jax.jit(lambda key: dropout_mask(key, SHAPE, 0.1))
    return [np.asarray(draw(jax.random.key(seed))) for seed in (0, 1)]


def test_threefry_2x32_equals_that_of_jax():
    key, counter = jnp.asarray([5, 7], jnp.uint32), jnp.arange(2**32 - 16, 2**32, 2, dtype=jnp.uint32)
    ours = jax.jit(threefry_2x32)((key[0], key[1]), (counter[:4], counter[4:]))
    np.testing.assert_array_equal(jnp.concatenate(ours), of_jax(key, counter))


def test_dropout_mask_drops_at_its_rate(masks):
    """Mean and variance are those of independent draws: within 5 standard errors, also of rows and columns."""
    for mask in masks:
        for axes in ((0, 1, 2, 3), (0, 1, 2), (0, 1, 3), (2, 3)):
            dropped = 1 - mask.mean(axes)
            count = mask.size / dropped.size
            assert np.abs(dropped - 0.1).max() < 5 * np.sqrt(0.09 / count)
        rows = mask.sum(3)
        assert rows.var() == pytest.approx(0.09 * SHAPE[2], rel=0.2)
    assert masks[0].mean() * kept_scale(0.1) == pytest.approx(1, abs=2e-3)


def test_dropout_mask_neighbours_are_independent(masks):
    """Rows, columns, heads, batch rows and keys are uncorrelated: within 5 standard errors."""
    a, b = (mask - mask.mean() for mask in masks)
    pairs = [(a, b)]
    for axis, most in enumerate(a.shape):
        # 4 draws come from one call, 64 are a block
        for shift in (1, 2, 3, 4, 64):
            if shift < most:
                pairs.append(
                    (np.delete(a, range(shift), axis), np.delete(a, range(most - shift, most), axis))
                )
    for x, y in pairs:
        assert abs((x * y).mean() / 0.09) < 5 / np.sqrt(x.size)


def test_kept_tile_is_a_part_of_the_whole_mask(masks):
    """Whatever the tile, and whatever the length of the rows."""

    @jax.jit
    def tile(key, query, first):
        seed = dropout_seed(key)
        return kept_tile((seed[0], seed[1]), 1 * 3 + 2, query, first, (16, 8), 0.1)

    for query, first in ((0, 0), (32, 64), (7, 248), (240, 4)):
        found = tile(jax.random.key(0), query, first)
        np.testing.assert_array_equal(found, masks[0][1, 2, query : query + 16, first : first + 8])
