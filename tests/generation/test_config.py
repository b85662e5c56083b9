"""`GenerationConfig`: which values and combinations are legal, and how a call's overrides merge into it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tiny_models import uniform_model

from gpt2jax.generation.config import ROW_FIELDS, GenerationConfig, resolve_configs


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("temperature", value) for value in (-0.1, float("nan"), float("inf"), 1e300, "1", None, True)],
        *[("top_k", value) for value in (-1, 2.0, "5", True)],
        *[("top_p", value) for value in (0, -0.1, 1.1, float("nan"), None)],
        *[("min_p", value) for value in (-0.1, 1.1, float("nan"))],
        *[("typical_p", value) for value in (0, 1.5)],
        *[("repetition_penalty", value) for value in (0, -1.0, float("inf"))],
        *[("presence_penalty", value) for value in ("1", float("nan"))],
        *[("frequency_penalty", value) for value in (None, float("inf"))],
        *[("no_repeat_ngram_size", value) for value in (-1, 2.5, True)],
        *[("min_new_tokens", value) for value in (-1, 1.0)],
        *[("max_new_tokens", value) for value in (0, 2.5, True)],
        *[("max_length", value) for value in (-1, "9")],
        *[("do_sample", value) for value in (1, "no", None)],
        *[("bad_words", value) for value in ([[]], [""], 5, [1, 2], [[-1]])],
        *[("stop_token_ids", value) for value in (5, ["x"], [-1])],
        *[("stop_strings", value) for value in (["a", ""], 5, [b"a"])],
        *[("num_return_sequences", value) for value in (0, None)],
        *[("top_logprobs", value) for value in (-1, 21)],
        ("prompt_lookup_num_tokens", -1),
        ("draft_model", "gpt2"),
        ("num_draft_tokens", 0),
        ("logits_processor", 5),
        *[("penalty_alpha", value) for value in (1.5, True)],
        ("num_beams", 0),
        *[(name, 2**31) for name in ("num_beams", "num_return_sequences", "num_draft_tokens")],
        ("prompt_lookup_num_tokens", 2**31),
        ("stop_strings", ["a", "\ud800"]),
        ("length_penalty", float("nan")),
        *[("early_stopping", value) for value in ("soon", 1)],
        ("overflow", "drop"),
    ],
)
def test_config_names_field_legal_values_and_value(field, value):
    with pytest.raises(ValueError, match=f"^{field} must be .*got ") as error:
        GenerationConfig(**{field: value})
    assert str(error.value).endswith(repr(value))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 4, "max_length": 9}, "max_length=9 does not go with max_new_tokens"),
        (
            {
                "num_beams": 2,
                "temperature": 0.5,
                "top_k": 7,
                "stop_strings": ".",
                "prompt_lookup_num_tokens": 4,
            },
            "num_beams=2 does not go with temperature, top_k, stop_strings, prompt_lookup_num_tokens",
        ),
        ({"num_beams": 2, "overflow": "sliding_window"}, "num_beams=2 does not go with overflow"),
        ({"num_beams": 2, "penalty_alpha": 0.6}, "num_beams=2 does not go with penalty_alpha"),
        (
            {"num_beams": 2, "num_return_sequences": 3},
            "num_return_sequences must be at most num_beams=2, got 3",
        ),
        (
            {"penalty_alpha": 0.6, "num_return_sequences": 2, "top_p": 0.5},
            "penalty_alpha=0.6 does not go with top_p, num_return_sequences",
        ),
        (
            {"penalty_alpha": 0.6, "prompt_lookup_num_tokens": 3},
            "penalty_alpha=0.6 does not go with prompt_lookup_num_tokens",
        ),
        (
            {"penalty_alpha": 0.5, "top_k": None},
            "top_k must be the number of candidates with penalty_alpha=0.5, got None",
        ),
        (
            {"prompt_lookup_num_tokens": 2, "draft_model": uniform_model()},
            "prompt_lookup_num_tokens=2 does not go with draft_model",
        ),
        ({"length_penalty": 2}, "length_penalty=2.0 needs beam search; give num_beams above 1"),
        ({"early_stopping": True}, "early_stopping=True needs beam search; give num_beams above 1"),
    ],
    ids=str,
)
def test_config_names_settings_that_exclude_each_other(settings, message):
    with pytest.raises(ValueError) as error:
        GenerationConfig(**settings)
    assert str(error.value) == message


def test_config_allows_what_changes_nothing():
    GenerationConfig(num_beams=3, do_sample=False, repetition_penalty=1.2, num_return_sequences=3)
    GenerationConfig(penalty_alpha=0.6, do_sample=False, stop_strings=["a"], repetition_penalty=1.2)


def test_config_takes_numbers_and_arrays_of_numpy():
    numbers: dict[str, Any] = {"temperature": np.float32(0.5), "top_k": np.int64(7)}
    config = GenerationConfig(**numbers, stop_token_ids=np.arange(2), bad_words=[np.array([3, 4]), "a"])  # type: ignore[arg-type]
    assert config == GenerationConfig(
        temperature=0.5, top_k=7, stop_token_ids=(0, 1), bad_words=((3, 4), "a")
    )
    assert type(config.top_k) is int


def test_resolve_configs_gives_each_row_its_values():
    base = GenerationConfig(top_p=0.5)
    overrides = {"temperature": [0.5, 1.0], "top_k": np.array([3, 4]), "eos_token_id": 7}
    shared, rows = resolve_configs(base, overrides, 2)
    assert shared == GenerationConfig(top_p=0.5, stop_token_ids=(7,))
    assert [(row.temperature, row.top_k, row.top_p) for row in rows] == [(0.5, 3, 0.5), (1.0, 4, 0.5)]
    shared, rows = resolve_configs(None, {"num_return_sequences": 3}, 2)
    assert len(rows) == 6
    assert resolve_configs([base] * 2, {}, 2)[1] == [base, base]
    assert (
        resolve_configs(None, {"num_beams": 3, "num_return_sequences": 3}, 2)[1]
        == [GenerationConfig(num_beams=3, num_return_sequences=3)] * 2
    )


@pytest.mark.parametrize(
    ("config", "overrides", "error", "message"),
    [
        (
            None,
            {"tempertaure": 1},
            TypeError,
            "there is no setting 'tempertaure'; did you mean 'temperature'",
        ),
        (None, {"temperature": [1.0]}, ValueError, "temperature must be one value or 2 values.* got 1"),
        ([GenerationConfig()], {}, ValueError, "config must be one value or 2 values.* got 1"),
        ("greedy", {}, ValueError, "config must be a GenerationConfig or a list of them.*got 'greedy'"),
        (
            [GenerationConfig(), GenerationConfig(stop_token_ids=[1])],
            {},
            ValueError,
            "stop_token_ids must be the same in the configs of all rows",
        ),
        (None, {"eos_token_id": 1, "stop_token_ids": [1]}, ValueError, "eos_token_id does not go with"),
        (None, {"temperature": [1.0, -1]}, ValueError, "temperature must be .*got -1"),
    ],
    ids=str,
)
def test_resolve_configs_names_mistakes(config, overrides, error, message):
    with pytest.raises(error, match=message):
        resolve_configs(config, overrides, 2)


def test_row_fields_are_fields():
    assert all(hasattr(GenerationConfig(), name) for name in ROW_FIELDS)


def test_top_k_of_zero_keeps_all_tokens():
    assert GenerationConfig(top_k=0) == GenerationConfig(top_k=None)
