"""The log as TensorBoard and Weights & Biases get it, and what is said where they are not installed."""

from __future__ import annotations

import dataclasses
import sys
import types

import pytest
from test_resume import CONFIG, SHAPE, train
from tiny_models import random_params

from gpt2jax.language_model import LanguageModel
from gpt2jax.train.loop import finetune


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel(SHAPE, random_params(SHAPE))


def test_what_is_not_installed(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = dataclasses.replace(CONFIG, track=("wandb",))
    with pytest.raises(ModuleNotFoundError, match="track='wandb' needs .*: pip install wandb"):
        train(model, config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="track.* writes into the run folder; give output"):
        finetune(model, [[1, 2, 3]], config, progress=False)
    with pytest.raises(ValueError, match="track='mlflow' is not known; known: tensorboard, wandb"):
        dataclasses.replace(CONFIG, track="mlflow")


def test_weights_and_biases_is_offline(model, tmp_path, monkeypatch):
    """What the client is called with; the client itself is somebody else's."""
    calls = []

    class Client:
        def log(self, values, step):
            calls.append((step, values))

        def finish(self):
            calls.append("finish")

    def init(**settings):
        calls.append(settings)
        return Client()

    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    run = train(model, dataclasses.replace(CONFIG, track="wandb"), tmp_path / "run")
    assert calls[0]["mode"] == "offline" and calls[0]["config"]["batch_size"] == 2
    logged = [(e["step"], {f"train/{k}": v for k, v in e.items() if k != "step"}) for e in run.history]
    assert calls[1:] == [*logged, "finish"]


def test_tensorboard_reads_the_log(model, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(model, dataclasses.replace(CONFIG, track="tensorboard"), tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    for name in ("loss", "validation_loss", "learning_rate"):
        expected = [(e["step"], e[name]) for e in run.history if name in e]
        found = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [value for _, value in found] == pytest.approx([value for _, value in expected], rel=1e-6)
