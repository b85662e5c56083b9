"""The settings of a run: what is legal, and how they are kept."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from typing import Any

import numpy as np
import pytest

from gpt2jax.lora.config import LoRAConfig
from gpt2jax.train.config import FinetuneConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch_size", 2.5),
        ("learning_rate", float("inf")),
        ("beta2", 1.0),
        ("packing", "windows"),
        ("optimizer", "adam"),
        ("schedule", "step"),
        ("remat", "some"),
        ("moments_dtype", "int8"),
        ("label_smoothing", 1.0),
        ("ema_decay", 1.0),
        ("decay_fraction", 0.0),
        ("patience", 0),
        ("lora_plus_ratio", 16.0),
        ("compute_dtype", "int8"),
        ("base_dtype", "int8"),  # without adapters
        ("gradient_accumulation_steps", 3),
        ("dropout", -0.1),
        ("seed", -1),
        ("seed", 2**32),
        ("learning_rate", True),
        ("weight_decay", True),
        ("epochs", "1"),
        ("packing", 5),
        ("freeze", 5),
        ("freeze", ("wte", 5)),
        ("freeze", {"wte"}),  # whose order is not the same in each program
        ("trackers", 5),
        ("lora", True),
        ("lora", 8),
        ("lora", {"rank": 8}),
        ("keep_best", "yes"),
        ("keep_best", 1),
        ("token_cache", 5),
        ("token_cache", ""),
    ],
)
def test_finetune_config_names_illegal_settings(field, value):
    name = "batch_size" if field == "gradient_accumulation_steps" else field
    got = 16 if field == "gradient_accumulation_steps" else value
    with pytest.raises(ValueError, match=rf"^{name} must be .*, got {re.escape(repr(got))}$"):
        FinetuneConfig(**{field: value})


def test_finetune_config_names_the_nearest_setting():
    with pytest.raises(TypeError, match="no setting 'final_learning_ratio'; did you mean 'final_lr_ratio'"):
        FinetuneConfig(final_learning_ratio=0.1)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "muon"}, "optimizer must be one of adamw, adafactor, lion, sgd with lora, got 'muon'"),
        ({"freeze": ("wte",)}, r"freeze must be empty with lora, got \('wte',\); LoRA trains adapters only"),
    ],
)
def test_finetune_config_refuses_what_does_not_go_with_lora(settings, message):
    with pytest.raises(ValueError, match=message):
        FinetuneConfig(lora=LoRAConfig(), **settings)


def test_finetune_config_keeps_settings_as_json_takes_them(monkeypatch):
    monkeypatch.setenv("HOME", "/home/one")
    given: dict[str, Any] = {
        "steps": np.int64(3),
        "learning_rate": np.float32(0.5),
        "freeze": ["wte"],
        "trackers": "wandb",
        "token_cache": pathlib.Path("~/cache"),
    }
    config = FinetuneConfig(**given)
    plain = dataclasses.asdict(config)
    assert json.loads(json.dumps(plain)) == {**plain, "freeze": ["wte"], "trackers": ["wandb"]}
    assert config.learning_rate == 0.5 and config.token_cache == "/home/one/cache"
    given = {"rank": np.int64(2), "alpha": np.float32(4), "rank_pattern": {"h.0": np.int64(1)}}
    lora = LoRAConfig(**given)
    assert lora == LoRAConfig(2, 4.0, rank_pattern={"h.0": 1}) and json.dumps(dataclasses.asdict(lora))
