"""Decoding over a cache against the plain forward pass, the derived weights, and what XLA makes of a step."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2jax.generation import cached_model
from gpt2jax.generation.cached_model import (
    decoding_precision,
    lm_head,
    prepare_decoding_params,
    prepare_model,
    weight_dtype,
)
from gpt2jax.generation.decoding import DecoderSpec, DecodeState, initial_state, make_decode_params
from gpt2jax.generation.kv_cache import grow_cache, init_cache
from gpt2jax.generation.requests import PromptState
from gpt2jax.generation.strategy import Sampling, decode
from gpt2jax.language_model import LanguageModel
from gpt2jax.lora.adapters import init_adapters
from gpt2jax.lora.config import LoRAConfig
from gpt2jax.model.config import PRESETS, GPT2Config
from gpt2jax.model.gpt2 import hidden_states, init_params, lm_head_weight, output_logits
from gpt2jax.ops.device import Device
from gpt2jax.ops.precision import Precision

TINY = GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=97, n_positions=24)
ODD = GPT2Config(
    n_layer=3,
    n_head=3,
    n_embd=24,
    n_inner=40,
    vocab_size=61,
    n_positions=17,
    tie_word_embeddings=False,
    scale_attn_by_inverse_layer_idx=True,
    activation_function="relu",
)
CPU = Device("cpu")
F32 = decoding_precision("float32", device=CPU)
GPT2_WIDE = dataclasses.replace(PRESETS["gpt2"], n_layer=3)


def params_of(config, seed=0):
    """Random parameters in which no bias or scale is at its initial value, and attention is not flat."""
    leaves, tree = jax.tree.flatten(init_params(config, seed))
    rng = np.random.default_rng(seed)
    noise = [jnp.asarray(rng.normal(0, 0.15, leaf.shape), jnp.float32) for leaf in leaves]
    return jax.tree.unflatten(tree, [leaf * 3 + n for leaf, n in zip(leaves, noise, strict=True)])


def ids_of(config, rows, length, seed=0) -> Any:
    return np.random.default_rng(seed).integers(0, config.vocab_size, (rows, length)).astype(np.int32)


def full_logits(params, config, ids):
    return np.asarray(output_logits(hidden_states(params, config, ids), lm_head_weight(params)))


step = jax.jit(
    lambda params, config, ids, cache, slot, padding, precision: _logits_of(
        params,
        cached_model.forward_with_cache(params, config, ids, cache, slot, padding, precision),
        precision,
    ),
    static_argnums=(1, 6),
)


def _logits_of(params, outputs, precision):
    hidden, cache = outputs
    return lm_head(params, hidden, precision), cache


def prefill(params, ids, padding, *, config, precision):
    """Logits [B, V] behind prompts, and a cache as long as they are."""
    rows, length = ids.shape
    cache = init_cache(config, rows, length, precision.activation_dtype)
    logits, cache = step(params, config, ids, cache, 0, padding, precision)
    return np.asarray(logits)[:, -1], cache


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(TINY, id="tiny"),
        pytest.param(ODD, id="odd"),
        pytest.param(GPT2_WIDE, id="gpt2-wide", marks=pytest.mark.thorough),
    ],
)
def test_decoding_equals_the_forward_pass_at_splits(config):
    """A prompt of each length in one call, the rest token by token: each logit is that of the plain forward
    pass.

    The prompts are padded on the left to one width, so that two programs serve all splits. At gpt2's width three
    splits must do: there each token takes long.
    """
    # at gpt2's width the weights are as they begin; noise on layers of them would grow into the thousands
    params, length = init_params(config) if config == GPT2_WIDE else params_of(config), 9
    ids = ids_of(config, 2, length)
    want = full_logits(params, config, ids)
    assert 1 < np.abs(want).max() < 100  # or agreement would say little
    derived = prepare_decoding_params(params, config, dtype="float32")
    for split in (1, 5, 9) if config == GPT2_WIDE else range(1, length + 1):
        padding = np.full(2, length - split, np.int32)
        prompt = np.pad(ids[:, :split], ((0, 0), (length - split, 0)))
        last, cache = prefill(derived, prompt, padding, config=config, precision=F32)
        np.testing.assert_allclose(last, want[:, split - 1], atol=1e-5 * np.abs(want).max())
        cache = grow_cache(cache, 2 * length)
        for i in range(length - split):
            token = ids[:, split + i : split + i + 1]
            got, cache = step(derived, config, token, cache, length + i, padding, F32)
            np.testing.assert_allclose(got[:, 0], want[:, split + i], atol=1e-5 * np.abs(want).max())


@pytest.mark.slow
def test_several_tokens_behind_a_cache():
    """T tokens at once behind a prefix, as verifying drafts needs them."""
    params, ids = params_of(TINY), ids_of(TINY, 2, 12)
    want = full_logits(params, TINY, ids)
    derived = prepare_decoding_params(params, TINY, dtype="float32")
    padding = np.zeros(2, np.int32)
    _, cache = prefill(derived, ids[:, :5], padding, config=TINY, precision=F32)
    got, _ = step(derived, TINY, ids[:, 5:], grow_cache(cache, 16), 5, padding, F32)
    np.testing.assert_allclose(got, want[:, 5:], atol=1e-5 * np.abs(want).max())


@pytest.mark.slow
def test_what_is_in_the_padding_does_not_matter():
    params, ids = params_of(TINY), ids_of(TINY, 3, 10)
    derived = prepare_decoding_params(params, TINY, dtype="float32")
    padding = np.array([0, 4, 9], np.int32)
    other = ids.copy()
    for row, pad in enumerate(padding):
        other[row, :pad] = (ids[row, :pad] + 1) % TINY.vocab_size
    first, _ = prefill(derived, ids, padding, config=TINY, precision=F32)
    second, _ = prefill(derived, other, padding, config=TINY, precision=F32)
    np.testing.assert_array_equal(first, second)
    for row, pad in enumerate(padding):
        want = full_logits(params, TINY, ids[row : row + 1, pad:])[0, -1]
        np.testing.assert_allclose(first[row], want, atol=2e-5 * np.abs(want).max())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_weights_stay_near(dtype):
    params, ids = params_of(TINY), ids_of(TINY, 1, 10)
    want = full_logits(params, TINY, ids)[:, -1]
    narrow = Precision.for_device(dtype)
    derived = prepare_decoding_params(params, TINY, dtype=narrow.compute_dtype)
    assert derived["h"][0]["attn"]["c_attn"]["kernel"].values.dtype == jnp.dtype(dtype)
    _, cache = prefill(derived, ids[:, :9], np.zeros(1, np.int32), config=TINY, precision=narrow)
    got, _ = step(derived, TINY, ids[:, 9:], grow_cache(cache, 16), 9, np.zeros(1, np.int32), narrow)
    error = np.abs(np.asarray(got)[:, 0] - want).max() / np.abs(want).max()
    assert 0 < error < (0.1 if dtype == "bfloat16" else 0.02)


@pytest.mark.slow
def test_derived_weights_have_their_dtype_and_layout():
    params = params_of(ODD)
    derived = prepare_decoding_params(params, ODD, dtype="bfloat16", vocab_size=50)
    assert len(derived["h"]) == ODD.n_layer
    np.testing.assert_array_equal(
        derived["head"].values, params["lm_head"]["kernel"][:50].astype(jnp.bfloat16)
    )
    for layer, block in enumerate(derived["h"]):
        kernel = params["h"]["mlp"]["c_fc"]["kernel"][layer]
        np.testing.assert_array_equal(block["mlp"]["c_fc"]["kernel"].values, kernel.T.astype(jnp.bfloat16))
        np.testing.assert_array_equal(block["ln_1"]["scale"], params["h"]["ln_1"]["scale"][layer])
        assert block["mlp"]["c_fc"]["bias"].dtype == jnp.float32
    # nothing is copied that does not change
    assert derived["wte"] is params["wte"]["embedding"]
    assert prepare_decoding_params(params, ODD, dtype="float32")["head"].values is params["lm_head"]["kernel"]


@pytest.mark.slow
def test_prepare_model_merges_adapters():
    params, lora = params_of(TINY), LoRAConfig(rank=4, alpha=6.0, targets=("attn.c_attn", "mlp.c_proj"))
    adapters = jax.tree.map(lambda x: x + 0.2, init_adapters(TINY, lora, 1))
    ids = ids_of(TINY, 2, 8)
    hidden = hidden_states(params, TINY, ids, adapters=adapters, lora_scale=lora.scale)
    want = np.asarray(output_logits(hidden, lm_head_weight(params)))[:, -1]
    assert np.abs(want - full_logits(params, TINY, ids)[:, -1]).max() > 0.1
    derived = prepare_model(LanguageModel(TINY, params, adapters=adapters, lora=lora), F32.compute_dtype)
    got, _ = prefill(derived, ids, np.zeros(2, np.int32), config=TINY, precision=F32)
    np.testing.assert_allclose(got, want, atol=2e-4 * np.abs(want).max())


def test_dtype_by_backend():
    assert decoding_precision(device=CPU).compute_dtype == jnp.float32
    assert decoding_precision(device=Device.of_backend("gpu")).compute_dtype == jnp.bfloat16
    assert decoding_precision("bfloat16", device=CPU).activation_dtype == jnp.float32
    assert decoding_precision("int8", device=CPU).compute_dtype == jnp.float32
    with pytest.raises(
        ValueError,
        match="dtype must be one of float32, tensorfloat32, bfloat16, float16, int8, or None, got 'int4'",
    ):
        decoding_precision("int4")


def test_cache_size_and_growth():
    cache = init_cache(TINY, 3, 10, jnp.bfloat16)
    assert sum(x.nbytes for x in jax.tree.leaves(cache)) == 2 * TINY.n_layer * 3 * 10 * TINY.n_embd * 2
    filled = jax.tree.map(lambda x: x + 1, cache)
    grown = grow_cache(filled, 12)
    for small, large in zip(jax.tree.leaves(filled), jax.tree.leaves(grown), strict=True):
        np.testing.assert_array_equal(large[:, :10], small)
        assert not large[:, 10:].any()
    with pytest.raises(ValueError, match="length must be at least 12, that of the cache, got 10"):
        grow_cache(grown, 10)


# ---- what the compiled step does ----

WIDE = GPT2Config(n_layer=2, n_head=4, n_embd=128, vocab_size=1000, n_positions=256)


def begun(batch: int, length: int) -> tuple[DecodeState, Any]:
    """Rows of one token that want five more."""
    rows = [PromptState("", [1], 5)] * batch
    settings = make_decode_params(rows, np.zeros(batch, np.int32), [5] * batch, 1)
    return initial_state(np.ones((batch, length), np.int32), settings.limits, 1), settings


def compiled_decode(batch, dtype) -> tuple[Any, Any]:
    config, narrow = WIDE, decoding_precision(dtype, device=CPU)
    weights = weight_dtype(dtype, narrow)
    params = jax.eval_shape(lambda: prepare_decoding_params(init_params(config), config, dtype=weights))
    cache = jax.eval_shape(lambda: init_cache(config, batch, 128, narrow.activation_dtype))
    state, settings = begun(batch, 128)
    lowered = decode.lower(
        Sampling(), DecoderSpec(config, narrow), params, cache, state, settings, np.int32(9)
    )
    return lowered.compile(), cache


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="reads what XLA:CPU compiles")
@pytest.mark.parametrize(
    ("batch", "dtype"),
    [(1, "float32"), (1, "bfloat16"), (1, "int8"), (4, "float32"), (4, "bfloat16"), (4, "int8")],
)
def test_a_step_copies_neither_weights_nor_cache(batch, dtype):
    """The loop writes the cache in place and streams the weights as they are.

    A batch of one is its own case: there XLA drops axes of size 1, which once cost six copies of each
    cache array.
    """
    program, cache = compiled_decode(batch, dtype)
    nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    assert program.memory_analysis().alias_size_in_bytes >= nbytes  # the donated cache is the returned one
    smallest = min(WIDE.n_embd**2, jax.tree.leaves(cache)[0].size)
    found = []
    pattern = r"= \w+\[([\d,]+)\]\S* (copy|convert|transpose|pad|concatenate)\((.*)"
    for dims, operation, line in re.findall(pattern, program.as_text()):
        found.append((int(np.prod([int(dim) for dim in dims.split(",")])), operation, line))
    assert found  # small ones there are: the pattern reads this text
    large = [item for item in found if item[0] >= smallest]
    assert not large, large


@pytest.mark.slow
def test_the_cache_handed_in_is_used_up():
    params = prepare_decoding_params(params_of(TINY), TINY, dtype="float32")
    cache = init_cache(TINY, 1, 32, jnp.float32)
    state, settings = begun(1, 32)
    pointers = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(cache)}
    spec = DecoderSpec(TINY, F32)
    new_cache, state = decode(Sampling(), spec, params, cache, state, settings, np.int32(16))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(cache))
    assert {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(new_cache)} == pointers
    assert state.lengths.tolist() == [5] and state.done.tolist() == [True] and int(state.cache_position) == 6


def test_configurations_are_static_arguments():
    """A configuration is hashable and compares by value: equal ones share compiled programs."""
    assert hash(dataclasses.replace(TINY)) == hash(TINY)
