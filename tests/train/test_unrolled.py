"""Unrolled layers: the same training, and stacked in everything that a run writes or returns."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from tiny_models import NO_DROPOUT, TINY, random_params

import gpt2jax.train.state as state_module
from gpt2jax.language_model import LanguageModel
from gpt2jax.lora.adapters import init_adapters
from gpt2jax.lora.config import LoRAConfig
from gpt2jax.model.config import PRESETS
from gpt2jax.model.gpt2 import hidden_states
from gpt2jax.ops.precision import Precision
from gpt2jax.train.checkpoint import Checkpoints
from gpt2jax.train.config import FinetuneConfig
from gpt2jax.train.finetune import finetune
from gpt2jax.train.optimizer import make_optimizer
from gpt2jax.train.step import init_state, make_train_step
from gpt2jax.train.unrolled import should_unroll, stack_layers, unstack_layers

CONFIG = FinetuneConfig(steps=6, batch_size=2, sequence_length=16, learning_rate=1e-2, ema_decay=0.9)


def state_and_step(config: FinetuneConfig):
    optimizer = make_optimizer(config, 6)
    step = make_train_step(TINY, optimizer, Precision.for_device("float32"), ema_decay=config.ema_decay)
    return init_state(random_params(), optimizer, loss_scaling=False, ema=True), step


def batch() -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 17)).astype(np.int32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "loss_mask": np.ones((2, 16), np.float32)}


@pytest.mark.slow
def test_unstack_layers_keeps_the_step():
    config = dataclasses.replace(CONFIG, optimizer="sgd")
    (state, step), (other, _) = state_and_step(config), state_and_step(config)
    unrolled = unstack_layers(other)
    assert list(unrolled["params"]["h"]) == list(range(TINY.n_layer))
    for _ in range(2):
        state, metrics = step(state, None, batch())
        unrolled, unrolled_metrics = step(unrolled, None, batch())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), metrics, unrolled_metrics)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state, stack_layers(unrolled))


@pytest.mark.slow
def test_stack_layers_undoes_unstack_layers():
    state, _ = state_and_step(CONFIG)
    again = stack_layers(unstack_layers(state))
    assert jax.tree.structure(again) == jax.tree.structure(state) == jax.tree.structure(stack_layers(state))
    jax.tree.map(np.testing.assert_array_equal, again, state)


@pytest.mark.slow
def test_hidden_states_of_unrolled_layers_with_dropout_adapters_and_remat():
    model = dataclasses.replace(TINY, resid_pdrop=0.2)  # each layer draws by its own key
    params, lora = random_params(), LoRAConfig(rank=2)
    adapters = jax.tree.map(lambda leaf: leaf + 0.1, init_adapters(TINY, lora))

    def gradient(params):
        def total(adapters):
            options = {"adapters": adapters, "remat": "full", "dropout_key": jax.random.key(0)}
            return hidden_states(params, model, batch()["tokens"], **options).sum()

        return jax.jit(jax.grad(total))(adapters)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        gradient(params),
        gradient(unstack_layers(params)),
    )


@pytest.mark.slow
def test_finetune_with_unrolled_layers_writes_and_returns_stacked_ones(tmp_path, monkeypatch):
    model = LanguageModel(dataclasses.replace(TINY, **NO_DROPOUT), random_params())
    texts = [np.random.default_rng(i).integers(0, 49, 30).tolist() for i in range(8)]
    config = dataclasses.replace(CONFIG, keep_best=True)
    options = {"validation_texts": texts[:2], "progress": False}
    unrolled = finetune(model, texts, config, output=tmp_path / "unrolled", **options)
    assert unrolled.output is not None
    checkpoints = Checkpoints(unrolled.output / "checkpoints")
    template, _ = state_and_step(config)
    saved, _ = checkpoints.restore(template)  # has the stacked structure and shapes, or it would refuse
    checkpoints.close()
    assert int(saved["step"]) == 6
    monkeypatch.setattr(state_module, "should_unroll", lambda *_: False)
    stacked = finetune(model, texts, config, **options)
    assert jax.tree.structure(unrolled.model.params) == jax.tree.structure(stacked.model.params)
    for a, b in zip(unrolled.history, stacked.history, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a.get("validation_loss", 0) == pytest.approx(b.get("validation_loss", 0), abs=1e-5)


def test_should_unroll():
    model, small = PRESETS["gpt2"], FinetuneConfig(batch_size=8)
    assert should_unroll(model, small, 128, "cpu", 1)
    assert not should_unroll(model, small, 1024, "cpu", 1)
    assert not should_unroll(model, small, 128, "gpu", 1)
    assert not should_unroll(model, small, 128, "cpu", 8)
    many = dataclasses.replace(small, batch_size=64)
    assert not should_unroll(model, many, 128, "cpu", 1)
    assert should_unroll(model, dataclasses.replace(many, gradient_accumulation_steps=8), 128, "cpu", 1)
    for change in (
        {"lora": LoRAConfig()},
        {"freeze": ("wte",)},
        {"remat": "full"},
        {"compute_dtype": "bfloat16"},
        {"optimizer": "muon"},
        {"optimizer": "adafactor"},
    ):
        assert not should_unroll(model, dataclasses.replace(small, **change), 128, "cpu", 1)
