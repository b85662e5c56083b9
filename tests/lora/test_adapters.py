"""Adapters: fresh ones change nothing, merged ones compute the same."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from tiny_models import TINY, random_params

import gpt2jax
from gpt2jax.language_model import LanguageModel
from gpt2jax.lora.adapters import init_adapters, merge_adapters, unmerge_adapters
from gpt2jax.lora.config import TARGETS, LoRAConfig, check_patterns
from gpt2jax.model.gpt2 import count_parameters, hidden_states

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


@pytest.mark.slow
def test_init_adapters_shapes():
    adapters = init_adapters(TINY, ALL)
    assert adapters["h"]["mlp"]["c_fc"]["lora_a"].shape == (2, 32, 4)
    assert adapters["h"]["mlp"]["c_fc"]["lora_b"].shape == (2, 4, 128)
    one = init_adapters(TINY, LoRAConfig(rank=4, targets=("attn.c_attn",)))
    assert list(one["h"]) == ["attn"] and list(one["h"]["attn"]) == ["c_attn"]
    assert count_parameters(one) == 2 * 4 * (32 + 96)


@pytest.mark.slow
def test_init_adapters_change_nothing(model):
    fresh = dataclasses.replace(model, adapters=init_adapters(TINY, ALL), lora=ALL)
    np.testing.assert_array_equal(logits(fresh), logits(model))


@pytest.mark.slow
def test_merge_adapter_equals_the_adapters(model, trained):
    before = jax.tree.map(np.array, model.params)
    merged = trained.merge_adapter()
    assert np.abs(logits(trained) - logits(model)).max() > 0.1
    np.testing.assert_allclose(logits(merged), logits(trained), atol=2e-5)
    assert merged.adapters is None and merged.merge_adapter() is merged
    jax.tree.map(np.testing.assert_array_equal, before, model.params)


@pytest.mark.slow
def test_merge_adapters_is_the_product_in_float64(model, trained):
    merged = merge_adapters(model.params, trained.adapters, ALL)
    pair = jax.tree.map(lambda x: np.asarray(x, np.float64), trained.adapters["h"]["attn"]["c_proj"])
    kernel = np.asarray(model.params["h"]["attn"]["c_proj"]["kernel"], np.float64)
    expected = kernel + 6.0 / 4 * pair["lora_a"] @ pair["lora_b"]
    np.testing.assert_allclose(merged["h"]["attn"]["c_proj"]["kernel"], expected, atol=1e-6)


KINDS = {
    "rsLoRA": LoRAConfig(rank=4, alpha=6.0, targets=("*",), use_rslora=True),
    "DoRA": LoRAConfig(rank=4, targets=("*",), use_dora=True),
    "slices": LoRAConfig(rank=4, targets=("attn.q", "attn.v", "*.c_proj"), alpha_pattern={"attn.v": 3}),
    "DoRA of slices": LoRAConfig(rank=4, targets=("attn.k", "attn.v"), use_dora=True),
    "ranks": LoRAConfig(rank=4, targets=("attn.c_attn",), rank_pattern={"h.1.attn.c_attn": 1}),
}


@pytest.mark.slow
@pytest.mark.parametrize("lora", KINDS.values(), ids=KINDS.keys())
def test_adapters_of_every_kind_start_merge_and_unmerge(model, lora):
    fresh = init_adapters(TINY, lora, params=model.params)
    kind = dataclasses.replace(model, adapters=fresh, lora=lora)
    np.testing.assert_allclose(logits(kind), logits(model), atol=5e-6)
    leaves, structure = jax.tree.flatten(fresh)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    kind = dataclasses.replace(kind, adapters=jax.tree.unflatten(structure, noisy))
    assert np.abs(logits(kind) - logits(model)).max() > 0.1
    np.testing.assert_allclose(logits(kind.merge_adapter()), logits(kind), atol=4e-5)
    merged = merge_adapters(model.params, kind.adapters, lora)
    if lora.use_dora:
        with pytest.raises(ValueError, match="keep the parameters"):
            unmerge_adapters(merged, kind.adapters, lora)
        return
    plain = unmerge_adapters(merged, kind.adapters, lora)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-7), plain, model.params)


def test_merge_adapters_dora_in_float64(model):
    lora = LoRAConfig(rank=4, alpha=6.0, targets=("attn.k",), use_dora=True)
    adapters = jax.tree.map(lambda x: x + 0.1, init_adapters(TINY, lora, params=model.params))
    merged = merge_adapters(model.params, adapters, lora)["h"]["attn"]["c_attn"]["kernel"]
    kernel = np.asarray(model.params["h"]["attn"]["c_attn"]["kernel"], np.float64)
    a, b, length = (
        np.asarray(adapters["h"]["attn"]["k"][name], np.float64) for name in ("lora_a", "lora_b", "magnitude")
    )
    direction = kernel[..., 32:64] + 1.5 * a @ b
    direction /= np.sqrt((direction**2).sum(1, keepdims=True))
    np.testing.assert_allclose(merged[..., 32:64], length[:, None] * direction, atol=1e-6)
    np.testing.assert_array_equal(merged[..., :32], kernel[..., :32])
    np.testing.assert_array_equal(merged[..., 64:], kernel[..., 64:])


@pytest.mark.slow
def test_rank_pattern_holds_in_training(model):
    lora = KINDS["ranks"]
    adapters = init_adapters(TINY, lora)
    pair = adapters["h"]["attn"]["c_attn"]
    assert pair["lora_a"].shape == (2, 32, 4) and not pair["lora_a"][1, :, 1:].any()

    def loss(adapters):
        scale = lora.scales(TINY.n_layer)
        ids = np.arange(20)[None]
        hidden = hidden_states(model.params, TINY, ids, adapters=adapters, lora_scale=scale)
        return (hidden**2).sum()

    step = jax.jit(
        lambda adapters: jax.tree.map(lambda x, g: x - 0.01 * g, adapters, jax.grad(loss)(adapters))
    )
    pair = step(step(adapters))["h"]["attn"]["c_attn"]
    assert pair["lora_b"][1, :1].any() and pair["lora_b"][0, 1:].any()
    assert not pair["lora_a"][1, :, 1:].any() and not pair["lora_b"][1, 1:].any()


def test_check_patterns_names_one_that_matches_nothing():
    check_patterns(KINDS["ranks"], TINY.n_layer)
    for lora in (
        LoRAConfig(rank_pattern={"h.2.attn.c_attn": 1}),
        LoRAConfig(alpha_pattern={"lm_head": 3}),
    ):
        message = "must match linear layers with an adapter, got .*; such a layer is h.1.attn.c_attn"
        with pytest.raises(ValueError, match=message):
            check_patterns(lora, TINY.n_layer)


def test_lora_config_fills_in_an_alpha_that_makes_the_scale_one():
    assert LoRAConfig() == LoRAConfig(32, 32, targets=("*",))
    assert LoRAConfig(rank=9).alpha == 9 and LoRAConfig(rank=9, use_rslora=True).alpha == 3
    assert LoRAConfig(rank=9).scale == LoRAConfig(rank=9, use_rslora=True).scale == 1


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rank": 0}, r"lora.rank must be a positive whole number below 2\*\*31, got 0"),
        ({"use_dora": 1}, "lora.use_dora must be True or False, got 1"),
        ({"targets": ("attn.c_attn", "attn.q")}, "lora.targets .*; attn.q is a part of attn.c_attn"),
        ({"targets": ("lm_*",)}, r"lora.targets must be .*, got \('lm_"),
        ({"rank_pattern": {"attn.q": 0}}, r"lora.rank_pattern\['attn.q'\] must be .*, got 0"),
        ({"alpha_pattern": {"attn.q": -1}}, r"lora.alpha_pattern\['attn.q'\] must be .*, got -1"),
        ({"rank_pattern": {"(": 2}}, r"lora.rank_pattern keys must be simple regular .*, got '\('; missing"),
        ({"rank_pattern": {"(a+)+": 2}}, "lora.rank_pattern keys must be simple regular expressions"),
        ({"rank_pattern": 3}, "lora.rank_pattern must be values by pattern, got 3"),
        ({"alpha": float("nan")}, "lora.alpha must be a positive number, or None, got nan"),
        ({"dropout": 1.0}, r"lora.dropout must be .* below 1, got 1\.0"),
        ({"targets": ("c_attn",)}, "lora.targets .*, got .*c_attn"),
        ({"targets": "attn.c_attn"}, "lora.targets must be a list of .*, got 'attn.c_attn'"),
        ({"targets": ()}, r"lora.targets .*, got \(\)"),
        ({"targets": None}, "lora.targets .*, got None"),
        ({"targets": [1]}, r"lora.targets .*, got \[1\]"),
        ({"dropout": "x"}, "lora.dropout .*, got 'x'"),
    ],
)
def test_lora_config_names_an_illegal_value(settings, named):
    with pytest.raises(ValueError, match=named):
        LoRAConfig(**settings)


@pytest.mark.slow
def test_load_run_of_dora_on_slices(model, tmp_path):
    """PEFT has no slices: what the run saves is one adapter of the whole, which computes the same."""
    texts = [list(np.random.default_rng(i).integers(0, 100, 20)) for i in range(8)]
    lora = LoRAConfig(rank=2, targets=("attn.q", "attn.v"), use_dora=True)
    settings = gpt2jax.FinetuneConfig(
        steps=2, batch_size=4, sequence_length=16, learning_rate=0.05, lora=lora, checkpoint_every=1
    )
    run = gpt2jax.finetune(model, texts, settings, output=tmp_path / "run", progress=False)
    adapters = run.model.adapters
    assert adapters is not None
    fresh = init_adapters(TINY, lora, settings.seed, params=model.params)
    for name in ("lora_b", "magnitude"):
        assert (adapters["h"]["attn"]["v"][name] != fresh["h"]["attn"]["v"][name]).any()
    again = gpt2jax.load(tmp_path / "run")
    np.testing.assert_allclose(logits(again), logits(run.model), atol=2e-5)
    assert np.abs(logits(again) - logits(model)).max() > 1e-3
