from __future__ import annotations

import dataclasses
import inspect
from typing import Annotated, Any, Literal

import numpy as np
import pytest

from gpt2jax.utils import validation
from gpt2jax.utils.validation import (
    each,
    in_range,
    non_negative_int,
    positive_int,
    string,
    unknown_name,
    validated,
)


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
