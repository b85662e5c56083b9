"""Configurations: the published sizes, Hugging Face's files, impossible values."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from gpt2jax.model.config import PRESETS, GPT2Config
from gpt2jax.model.gpt2 import abstract_params, count_parameters


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
        ("gpt2-mini", 4_273_664),
    ],
)
def test_presets_have_the_published_sizes(name, parameters):
    assert count_parameters(abstract_params(PRESETS[name])) == parameters


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("n_layer", 1.5),
        ("n_embd", 2**31),
        ("n_inner", 10**30),
        ("n_head", 5),
        ("n_inner", -1),
        ("activation_function", "mish"),
        ("attn_pdrop", 1.0),
        ("embd_pdrop", "0.1"),
        ("layer_norm_epsilon", 0.0),
        ("initializer_range", None),
        ("eos_token_id", 50257),
        ("bos_token_id", "<s>"),
        ("eos_token_id", True),
        ("scale_attn_weights", "yes"),
        ("scale_attn_by_inverse_layer_idx", 1),
        ("reorder_and_upcast_attn", None),
        ("tie_word_embeddings", None),
        ("layer_norm_epsilon", float("inf")),
        ("resid_pdrop", False),
    ],
)
def test_gpt2_config_names_an_illegal_value(field, value):
    with pytest.raises(ValueError, match=f"^{field} must be .*, got {value!r}$"):
        GPT2Config(**{field: value})


def test_gpt2_config_converts_numpy_numbers():
    config = GPT2Config(vocab_size=np.int64(300), n_embd=np.int32(24), embd_pdrop=np.float32(0.5))  # pyright: ignore
    assert config == GPT2Config(vocab_size=300, n_embd=24, embd_pdrop=0.5)
    assert json.loads(json.dumps(config.to_hf()))["vocab_size"] == 300


def test_from_hf_undoes_to_hf():
    config = GPT2Config(
        n_inner=100,
        activation_function="relu",
        scale_attn_by_inverse_layer_idx=True,
        tie_word_embeddings=False,
    )
    assert GPT2Config.from_hf(config.to_hf()) == config
    assert GPT2Config.from_hf({"vocab_size": 300, "eos_token_id": 50256}).eos_token_id is None
    assert GPT2Config.from_hf({"eos_token_id": [7, 8]}).eos_token_id == 7
    assert GPT2Config.from_hf({"eos_token_id": None}).eos_token_id is None
    assert (
        GPT2Config.from_hf({}).eos_token_id == 50256
        and GPT2Config.from_hf({"vocab_size": 65}).eos_token_id is None
    )


@pytest.mark.parametrize("content", [{"model_type": "llama"}, {"add_cross_attention": True}])
def test_from_hf_rejects_other_architectures(content):
    with pytest.raises(ValueError, match=next(iter(content))):
        GPT2Config.from_hf(content)


def test_gpt2_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        GPT2Config().n_layer = 3  # pyright: ignore[reportAttributeAccessIssue]
