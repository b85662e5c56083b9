"""The log as TensorBoard and Weights & Biases get it, and the errors if they are not installed."""

from __future__ import annotations

import dataclasses
import pathlib
import struct
import sys
import types
from typing import Any

import numpy as np
import pytest
from test_resume import CONFIG, SHAPE, train
from tiny_models import random_params

from gpt2jax.language_model import LanguageModel
from gpt2jax.train.finetune import finetune


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel(SHAPE, random_params(SHAPE))


def test_check_trackers_says_what_to_install(model, tmp_path, monkeypatch):
    for name, module, package in (
        ("wandb", "wandb", "wandb"),
        ("tensorboard", "tensorboardX", "tensorboardX"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        config = dataclasses.replace(CONFIG, trackers=(name,))
        with pytest.raises(ModuleNotFoundError, match=f"trackers='{name}' needs .*: pip install {package}$"):
            train(model, config, tmp_path / "run")
        assert not (tmp_path / "run").exists()
    with pytest.raises(
        ValueError, match=r"trackers must be empty without output, got \('tensorboard',\); they write"
    ):
        finetune(model, [[1, 2, 3]], config, progress=False)
    with pytest.raises(ValueError, match="trackers must be .* one of tensorboard, wandb, got 'mlflow'"):
        dataclasses.replace(CONFIG, trackers="mlflow")


@pytest.mark.slow
def test_wandb_is_offline_and_has_the_log(model, tmp_path, monkeypatch):
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
    run = train(model, dataclasses.replace(CONFIG, trackers="wandb"), tmp_path / "run")
    assert calls[0]["mode"] == "offline" and calls[0]["config"]["batch_size"] == 2
    logged = [(e["step"], {tag(k): v for k, v in e.items() if k != "step"}) for e in run.history]
    assert calls[1:] == [*logged, "finish"]


def tag(name: str) -> str:
    """Return what trackers call a figure of the log."""
    group, _, figure = name.rpartition("validation_")
    return f"validation/{figure}" if "validation_" in name and not group else f"train/{name}"


def read_events(folder: pathlib.Path) -> list[Any]:
    """Read an event file: records of a length, its checksum, a protocol buffer, and its checksum."""
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]  # made by protobuf

    (file,) = (path for path in folder.iterdir() if path.is_file())
    data, at, events = file.read_bytes(), 0, []
    while at < len(data):
        (size,) = struct.unpack_from("<Q", data, at)
        events.append(Event.FromString(data[at + 12 : at + 12 + size]))
        at += 12 + size + 4
    return events


@pytest.mark.slow
def test_tensorboard_has_the_log(model, tmp_path):
    pytest.importorskip("tensorboardX")
    run = train(model, dataclasses.replace(CONFIG, trackers="tensorboard"), tmp_path / "run")
    events = read_events(tmp_path / "run" / "tensorboard")
    values = [
        (event.step, value.tag, value.simple_value) for event in events for value in event.summary.value
    ]
    expected = [
        (entry["step"], tag(name), value)
        for entry in run.history
        for name, value in entry.items()
        if name != "step"
    ]
    assert [value[:2] for value in values] == [value[:2] for value in expected]
    assert any("validation/loss" in value for value in values)
    settings = read_events(tmp_path / "run" / "tensorboard" / "settings")
    assert any("batch_size" in str(event) for event in settings)
    np.testing.assert_allclose([v[2] for v in values], [v[2] for v in expected], rtol=1e-6)
