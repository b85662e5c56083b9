"""Loading by name or path, and saving."""

from __future__ import annotations

import time

import jax
import numpy as np
import pytest
from tiny_models import CONFIG, TINY, random_model, random_params

import gpt2jax
from gpt2jax.language_model import LanguageModel


def test_packaged_model_loads_offline_and_fast(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    began = time.perf_counter()
    model = gpt2jax.load("gpt2-mini")
    assert time.perf_counter() - began < 2
    assert model.num_parameters() == 4_273_664 and model.tokenizer is not None
    texts = gpt2jax.load_texts("python-docs", split="validation", limit=20)
    assert gpt2jax.evaluate(model, texts, sequence_length=128).loss < 3.6


@pytest.mark.parametrize("format", ["hf", "keras"])
def test_saved_and_loaded(tmp_path, format):
    model = random_model(0)
    model.save(tmp_path / "saved", format=format)
    again = gpt2jax.load(tmp_path / "saved")
    jax.tree.map(np.testing.assert_array_equal, model.params, again.params)
    assert again.tokenizer is not None and again.tokenizer.encode("the end") == model.tokenizer.encode(
        "the end"
    )  # pyright: ignore
    assert again.config.n_embd == CONFIG.n_embd


def test_adapters_are_merged_into_what_is_saved(tmp_path):
    lora = gpt2jax.LoRAConfig(rank=2)
    from gpt2jax.lora import init_adapters

    adapters = jax.tree.map(lambda x: x + 0.1, init_adapters(TINY, lora))
    model = LanguageModel(TINY, random_params(), adapters=adapters, lora=lora)
    model.save(tmp_path / "merged")
    gpt2jax.save_adapter(model, tmp_path / "adapter")
    plain = LanguageModel(TINY, random_params())
    ids = np.arange(12)[None]
    np.testing.assert_allclose(gpt2jax.load(tmp_path / "merged").logits(ids), model.logits(ids), atol=1e-5)
    adapted = gpt2jax.load_adapter(plain, tmp_path / "adapter")
    np.testing.assert_allclose(adapted.logits(ids), model.logits(ids), atol=1e-6)
    with pytest.raises(ValueError, match="no adapters to save"):
        gpt2jax.save_adapter(plain, tmp_path / "none")


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("gpt3", ValueError, "gpt2-mini.*hub ids"),
        ("./nothing/here", FileNotFoundError, "nothing/here"),
        ("weights.safetensors", FileNotFoundError, "weights.safetensors"),
    ],
)
def test_names_that_are_none(name, error, message):
    with pytest.raises(error, match=message):
        gpt2jax.load(name)


def test_unknown_format_and_name(tmp_path):
    with pytest.raises(ValueError, match="format='gguf' is not known; known: hf, keras"):
        random_model(0).save(tmp_path / "x", format="gguf")
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        gpt2jax.laod  # pyright: ignore  # noqa: B018
    assert set(gpt2jax.__all__) <= set(dir(gpt2jax))
    assert all(getattr(gpt2jax, name) is not None for name in gpt2jax.__all__)
