"""Presets and weights files of keras-hub read by us, and ours by it."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpt2jax
from gpt2jax.weights.keras import save_keras

keras_hub = pytest.importorskip("keras_hub")
keras = pytest.importorskip("keras")

# what these libraries say to each other
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "UserWarning")]

SIZE: dict[str, Any] = {
    "vocabulary_size": 300,
    "num_layers": 2,
    "num_heads": 4,
    "hidden_dim": 32,
    "intermediate_dim": 40,
    "dropout": 0.2,
    "max_sequence_length": 48,
}
IDS = np.random.default_rng(0).integers(0, 300, (2, 40))


def random_model():
    """A model of keras-hub whose every leaf is random."""
    rng = np.random.default_rng(1)
    backbone = keras_hub.models.GPT2Backbone(**SIZE)
    values = [rng.normal(size=v.shape, scale=0.15) + ("gamma" in v.path) for v in backbone.weights]
    backbone.set_weights(values)
    return keras_hub.models.GPT2CausalLM(backbone=backbone, preprocessor=None)


def logits(model) -> np.ndarray:
    outputs = model({"token_ids": IDS, "padding_mask": np.ones_like(IDS)})
    return np.asarray(keras.ops.convert_to_numpy(outputs))


def assert_same_logits(path, model) -> None:
    expected = logits(model)
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(gpt2jax.load(path).logits(IDS), expected, rtol=1e-5, atol=1e-5)


def test_preset(tmp_path):
    model = random_model()
    model.save_to_preset(str(tmp_path / "preset"))
    assert_same_logits(tmp_path / "preset", model)


def test_weights_files(tmp_path):
    model = random_model()
    model.compile(optimizer="adam", loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    inputs = {"token_ids": IDS, "padding_mask": np.ones_like(IDS)}
    model.fit(inputs, IDS, epochs=1, verbose=0)  # so that the file has the state of an optimizer too
    model.save_weights(tmp_path / "whole.weights.h5")
    model.backbone.save_weights(tmp_path / "backbone.weights.h5")
    assert_same_logits(tmp_path / "whole.weights.h5", model)
    assert_same_logits(tmp_path / "backbone.weights.h5", model)


def test_merged_adapters(tmp_path):
    model = random_model()
    model.backbone.enable_lora(4)
    rng = np.random.default_rng(2)
    for variable in model.backbone.trainable_weights:
        if "lora" in variable.path:
            variable.assign(rng.normal(size=variable.shape, scale=0.1))
    model.save_weights(tmp_path / "merged.weights.h5")
    assert_same_logits(tmp_path / "merged.weights.h5", model)


@pytest.mark.parametrize(
    "layers",
    [
        None,
        ["query", "key", "attention_output", "feedforward_intermediate_dense", "feedforward_output_dense"],
    ],
    ids=["keras-hub's choice", "all others"],
)
def test_adapter_file(tmp_path, layers):
    model = random_model()
    model.save_to_preset(str(tmp_path / "preset"))
    base = gpt2jax.load(tmp_path / "preset")
    np.testing.assert_allclose(base.logits(IDS), logits(model), rtol=1e-5, atol=1e-5)
    model.backbone.enable_lora(4, target_layer_names=layers)
    rng = np.random.default_rng(2)
    for variable in model.backbone.trainable_weights:
        if "lora" in variable.path:
            variable.assign(rng.normal(size=variable.shape, scale=0.1))
    model.backbone.save_lora_weights(str(tmp_path / "adapter.lora.h5"))
    adapted = gpt2jax.load_adapter(base, tmp_path / "adapter.lora.h5")
    assert np.abs(base.logits(IDS) - logits(model)).max() > 0.1
    np.testing.assert_allclose(adapted.logits(IDS), logits(model), rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(adapted.merge_adapter().logits(IDS), logits(model), rtol=1e-5, atol=2e-5)


def test_keras_hub_reads_our_preset(tmp_path):
    tokenizer = gpt2jax.Tokenizer.gpt2(300)
    config = gpt2jax.GPT2Config(vocab_size=300, n_positions=48, n_embd=32, n_layer=2, n_head=4, n_inner=40)
    ours = gpt2jax.from_config(config)
    rng = np.random.default_rng(3)
    params = jax.tree.map(lambda x: jnp.asarray(0.15 * rng.normal(size=x.shape), x.dtype), ours.params)
    ours = dataclasses.replace(ours, params=params)
    save_keras(tmp_path / "preset", config, params, tokenizer)
    theirs = keras_hub.models.GPT2CausalLM.from_preset(str(tmp_path / "preset"))
    np.testing.assert_allclose(ours.logits(IDS), logits(theirs), rtol=1e-5, atol=1e-5)
    text = "The model, once saved, is read by others.\n"
    read = keras_hub.tokenizers.GPT2Tokenizer.from_preset(str(tmp_path / "preset"))
    assert [int(i) for i in read(text)] == tokenizer.encode(text)


def test_evaluate(tmp_path):
    """Compare the two Keras figures of gpt2-mini with keras-hub's own preprocessing and `evaluate`.

    Texts of words: keras-hub of today cuts numbers, line breaks and punctuation as Llama 3 does.
    """
    odd = ["", "a", " ", "été 東京 and 🙂 e\u0301", "naïve Ω β", "ААА", "\u00a0x"]
    found = gpt2jax.load_texts("python-docs", split="test", limit=60)
    texts = odd + [" ".join(re.findall("[A-Za-z]+", text)[3:]) for text in found]
    ours = gpt2jax.load("gpt2-mini")
    ours.save(tmp_path / "preset", format="keras")
    theirs = keras_hub.models.GPT2CausalLM.from_preset(str(tmp_path / "preset"), dtype="float32")
    theirs.preprocessor.sequence_length = 32
    theirs.compile(  # as keras-nlp did by default when the study was made
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[keras.metrics.SparseCategoricalAccuracy()],
        weighted_metrics=[],
    )
    loss, accuracy = theirs.evaluate(texts, batch_size=8, verbose=0)
    result = gpt2jax.evaluate(ours, texts, sequence_length=32, batch_size=8)
    assert result.keras is not None and result.tokens < result.keras.positions  # there is padding
    assert round(accuracy * result.keras.positions) == result.keras.correct
    assert result.keras_loss == pytest.approx(loss, rel=1e-5)
