from __future__ import annotations

import jax
import numpy as np
import pytest

from gpt2jax.comparison import generations
from gpt2jax.comparison.generations import repetition, repetition_by_model
from gpt2jax.generation.config import GenerationConfig
from gpt2jax.generation.generate import generate


def test_generate_texts_times_a_call_that_compiles_again(model, monkeypatch):
    asked = []

    def generate_and_compile(model, prompts, config, **settings):
        asked.append(prompts[0])
        if len(asked) in (1, 4):
            jax.jit(lambda x: x + len(asked))(np.arange(3))
        return generate(model, prompts, config, **settings)

    generate(model, ["a"], max_new_tokens=2)  # compiles what the next ones need
    monkeypatch.setattr(generations, "generate", generate_and_compile)
    found, first = generations.generate_texts(
        {"m": model}, ["a", "b", "c"], GenerationConfig(max_new_tokens=2), 0
    )
    assert asked == ["a", "a", "b", "c", "c"] and [entry["prompt"] for entry in found] == ["a", "b", "c"]
    assert first["m"] > 0


def test_repetition_by_hand():
    # a b a b a b: 2 of 6 tokens, 2 of 5 pairs, 2 of 3 quadruples are new
    figures = repetition([1, 2, 1, 2, 1, 2])
    by_hand = {"distinct_1": 1 / 3, "distinct_2": 2 / 5, "distinct_3": 2 / 4, "repeated_4": 1 / 3}
    assert figures == pytest.approx(by_hand)
    assert repetition([1]) == {"distinct_1": 1.0, "distinct_2": None, "distinct_3": None, "repeated_4": None}


def test_repetition_by_model_by_hand():
    texts = {"a": [[1, 2, 1, 2, 1, 2], [2, 1, 2, 1, 9], []], "b": [[1, 2, 3, 4]]}
    generations = [
        {"model": name, "token_ids": ids, "tokens": len(ids), "seconds": 0.5}
        for name, rows in texts.items()
        for ids in rows
    ]
    found = repetition_by_model(generations)
    # of "a": 4-grams 1212 and 2121 in the first text, 2121 and 1219 in the second; the shared one is half of each
    assert found["a"]["self_overlap_4"] == 0.5 and found["b"]["self_overlap_4"] is None
    assert found["a"]["repeated_4"] == pytest.approx(1 / 5)
    assert found["a"]["distinct_1"] == pytest.approx((2 + 3) / 11)
    assert found["a"]["tokens"] == 11 and found["a"]["tokens_per_second"] == pytest.approx(11 / 1.5, abs=0.05)
