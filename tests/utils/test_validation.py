from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Annotated, Any, Literal

import numpy as np
import pytest

import gpt2jax
from gpt2jax.evaluation.config import EvaluationConfig
from gpt2jax.generation.config import GenerationConfig
from gpt2jax.lora.config import LoRAConfig
from gpt2jax.train.config import FinetuneConfig
from gpt2jax.utils import validation
from gpt2jax.utils.other_names import _OURS, our_name
from gpt2jax.utils.validation import (
    each,
    in_range,
    non_negative_int,
    positive_int,
    string,
    unknown_name,
    validated,
)

NO_MODEL: Any = None
CONFIGS: tuple[Any, ...] = (FinetuneConfig, LoRAConfig, GenerationConfig, EvaluationConfig)


@validated
@dataclasses.dataclass(frozen=True)
class Config:
    steps: Annotated[int, positive_int] = 3
    warmup: Annotated[int | None, non_negative_int] = None
    dropout: Annotated[float, in_range(0, 1, open_end=True)] = 0.0
    optimizer: Literal["adamw", "sgd"] = "adamw"
    nesterov: bool = False
    names: Annotated[tuple[str, ...], each(string)] = ()
    seed: Annotated[int, validation.seed] = 0

    def __post_init__(self) -> None:
        if self.warmup is not None and self.warmup >= self.steps:
            raise ValueError(f"warmup must be below steps={self.steps}, got {self.warmup}")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", 0, "steps must be a positive whole number, got 0"),
        ("steps", True, "steps must be a positive whole number, got True"),
        ("warmup", -1, "warmup must be a whole number of at least 0, or None, got -1"),
        ("dropout", 1, "dropout must be a number of at least 0 and below 1, got 1"),
        ("dropout", float("nan"), "dropout must be a number of at least 0 and below 1, got nan"),
        ("optimizer", "adam", "optimizer must be one of adamw, sgd, got 'adam'"),
        ("nesterov", 1, "nesterov must be True or False, got 1"),
        ("names", "wte", "names must be a list, each item a text, got 'wte'"),
        ("seed", 2**32, "seed must be a whole number from 0 to 2\\*\\*32 - 1, got 4294967296"),
        ("warmup", 3, "warmup must be below steps=3, got 3"),
    ],
)
def test_validated_names_field_rule_and_value(field, value, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Config(**{field: value})


def test_validated_converts_to_python_types():
    given: dict[str, Any] = {
        "steps": np.int64(4),
        "dropout": np.float32(0.5),
        "names": ["a"],
        "warmup": np.int32(1),
    }
    config = Config(**given)
    assert config == Config(steps=4, dropout=0.5, names=("a",), warmup=1)
    assert type(config.steps) is int and type(config.dropout) is float and type(config.names) is tuple


def test_validated_names_the_nearest_field():
    with pytest.raises(TypeError, match="there is no setting 'stpes'; did you mean 'steps'\\?"):
        Config(stpes=1)  # pyright: ignore[reportCallIssue]


def test_validated_keeps_signature_and_replace():
    assert list(inspect.signature(Config).parameters)[:2] == ["steps", "warmup"]
    assert dataclasses.replace(Config(), steps=5).steps == 5
    with pytest.raises(ValueError, match="steps must be"):
        dataclasses.replace(Config(), steps=0)


def test_unknown_name_lists_all_if_none_is_near():
    assert unknown_name("option", "zzz", ["steps", "seed"]) == "there is no option 'zzz'; known: steps, seed"


def test_validated_checks_a_class_without_post_init():
    @validated
    @dataclasses.dataclass(frozen=True)
    class Plain:
        rank: Annotated[int, positive_int] = 8

        error_prefix = "lora."

    assert type(Plain(np.int64(2)).rank) is int  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="^lora.rank must be a positive whole number, got 0$"):
        Plain(rank=0)


@pytest.mark.parametrize(
    ("make", "name", "ours"),
    [
        (FinetuneConfig, "num_train_epochs", "epochs"),
        (FinetuneConfig, "per_device_train_batch_size", "batch_size"),
        (FinetuneConfig, "max_length", "sequence_length"),
        (FinetuneConfig, "lora_dropout", "dropout"),
        (LoRAConfig, "r", "rank"),
        (LoRAConfig, "lora_alpha", "alpha"),
        (LoRAConfig, "target_modules", "targets"),
        (GenerationConfig, "eos_token_id", "stop_token_ids"),
        (EvaluationConfig, "block_size", "sequence_length"),
        (functools.partial(gpt2jax.finetune, NO_MODEL, []), "output_dir", "output"),
        (functools.partial(gpt2jax.finetune, NO_MODEL, []), "lr", "learning_rate"),
        (functools.partial(gpt2jax.compare, {}, []), "max_tokens", "max_new_tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_check_names_gives_our_name_of_a_setting_elsewhere(make, name, ours):
    with pytest.raises(TypeError, match=f"there is no setting '{name}'; did you mean '{ours}'\\?"):
        make(**{name: 1})


def test_our_name_is_of_what_is_known():
    known = {field.name for config in CONFIGS for field in dataclasses.fields(config)}
    known |= {f"lora.{field.name}" for field in dataclasses.fields(LoRAConfig)} | set(gpt2jax.__all__)
    known |= set(inspect.signature(gpt2jax.finetune).parameters) | {"out", "eval_data", "data", "dtype"}
    for name, ours in _OURS.items():
        assert {ours} <= known if isinstance(ours, str) else set(ours) <= known | {"generation"}, name
    assert our_name("r", ["lora.rank"]) == "lora.rank" and our_name("r", ["steps"]) is None


def test_package_names_ours_of_a_class_elsewhere():
    with pytest.raises(AttributeError, match="no attribute 'LoraConfig'; did you mean 'LoRAConfig'\\?"):
        _ = gpt2jax.LoraConfig  # pyright: ignore[reportAttributeAccessIssue]
    assert not hasattr(gpt2jax, "nothing_like_it")
