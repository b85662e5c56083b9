"""The Keras figures against those of keras-hub's own `evaluate`: see tests/golden/make_keras_evaluation.py."""

from __future__ import annotations

import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest

from gpt2jax.evaluation.evaluate import evaluate
from gpt2jax.language_model import LanguageModel
from gpt2jax.model.config import GPT2Config

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"


@pytest.fixture(scope="module")
def maker():
    path = GOLDEN / "make_keras_evaluation.py"
    spec = importlib.util.spec_from_file_location("make_keras_evaluation", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_keras_metrics_equal_keras_hub(maker):
    golden = json.loads((GOLDEN / "keras_evaluation.json").read_text())
    params = jax.tree.map(jnp.asarray, maker.random_params(golden["seed"], golden["shape"]))
    model = LanguageModel(GPT2Config(**golden["shape"]), params)
    documents = maker.texts(golden["seed"], golden["shape"]["vocab_size"])
    result = evaluate(model, documents, sequence_length=golden["sequence_length"], batch_size=16)
    assert result.keras is not None
    assert result.keras.correct == golden["hits"]
    assert result.keras.positions == golden["positions"]
    assert result.tokens == golden["tokens"]
    assert result.keras_loss == pytest.approx(golden["loss"], rel=1e-5)
    # some correct predictions are on padding
    assert result.keras.correct > result.per_document.correct.sum()
