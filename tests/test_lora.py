"""Adapters: fresh ones change nothing, merged ones compute the same."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from tiny_models import TINY, random_params

from gpt2jax.language_model import LanguageModel
from gpt2jax.lora import TARGETS, LoRAConfig, init_adapters, merge_adapters
from gpt2jax.model import count_parameters

ALL = LoRAConfig(rank=4, alpha=6.0, targets=TARGETS)


@pytest.fixture(scope="module")
def model():
    return LanguageModel(TINY, random_params())


@pytest.fixture(scope="module")
def trained(model):
    """The model with adapters that are not at their beginning any more."""
    adapters = init_adapters(TINY, ALL, seed=1)
    leaves, structure = jax.tree.flatten(adapters)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    return dataclasses.replace(model, adapters=jax.tree.unflatten(structure, noisy), lora=ALL)


def logits(model):
    return model.logits(np.arange(40).reshape(2, 20) % TINY.vocab_size)


def test_shapes():
    adapters = init_adapters(TINY, ALL)
    assert adapters["h"]["mlp"]["c_fc"]["lora_a"].shape == (2, 32, 4)
    assert adapters["h"]["mlp"]["c_fc"]["lora_b"].shape == (2, 4, 128)
    one = init_adapters(TINY, LoRAConfig(rank=4))
    assert list(one["h"]) == ["attn"] and list(one["h"]["attn"]) == ["c_attn"]
    assert count_parameters(one) == 2 * 4 * (32 + 96)


def test_fresh_adapters_change_nothing(model):
    fresh = dataclasses.replace(model, adapters=init_adapters(TINY, ALL), lora=ALL)
    np.testing.assert_array_equal(logits(fresh), logits(model))


def test_merged_equals_adapted(model, trained):
    before = jax.tree.map(np.array, model.params)
    merged = trained.merge_adapter()
    assert np.abs(logits(trained) - logits(model)).max() > 0.1
    np.testing.assert_allclose(logits(merged), logits(trained), atol=2e-5)
    assert merged.adapters is None and merged.merge_adapter() is merged
    jax.tree.map(np.testing.assert_array_equal, before, model.params)


def test_merge_is_the_product_in_float64(model, trained):
    merged = merge_adapters(model.params, trained.adapters, ALL)
    pair = jax.tree.map(lambda x: np.asarray(x, np.float64), trained.adapters["h"]["attn"]["c_proj"])
    kernel = np.asarray(model.params["h"]["attn"]["c_proj"]["kernel"], np.float64)
    expected = kernel + 6.0 / 4 * pair["lora_a"] @ pair["lora_b"]
    np.testing.assert_allclose(merged["h"]["attn"]["c_proj"]["kernel"], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rank": 0}, "rank=0"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"dropout": 1.0}, r"dropout=1\.0"),
        ({"targets": ("c_attn",)}, "c_attn"),
        ({"targets": ()}, r"targets=\(\)"),
    ],
)
def test_impossible_settings_are_named(settings, named):
    with pytest.raises(ValueError, match=named):
        LoRAConfig(**settings)
