"""How many programs calls of generation compile."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from generation_models import LONG, model_of, steep_model

from gpt2jax.generation.generate import generate, stream
from gpt2jax.model.config import GPT2Config
from gpt2jax.model.gpt2 import init_params


@pytest.fixture(scope="module")
def model():
    return steep_model()


def compiled_in(caplog, calls) -> list[str]:
    """What jax compiles while `calls` run."""
    caplog.clear()
    with jax.log_compiles():
        calls()
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith("Compiling ")]


@pytest.mark.slow
def test_settings_compile_nothing_anew(model, caplog):
    prompts = [LONG, "hello world", ""]
    generate(model, prompts, max_new_tokens=16)
    list(stream(model, "a", max_new_tokens=16))
    variants: list[Any] = [
        {"temperature": [0.3, 0, 1]},
        {"do_sample": False},
        {"top_k": 64},
        {"top_k": None, "top_p": 0.5, "min_p": 0.1, "typical_p": 0.9},
        {"seed": [5, 2**31, 7]},
        {"stop_token_ids": [1, 2, 3, 4]},
        {"stop_strings": ["a", "bcd"]},
        {"repetition_penalty": 1.5, "presence_penalty": [0, 1, 0], "frequency_penalty": 0.5},
        {"no_repeat_ngram_size": 2, "min_new_tokens": 4, "bad_words": [[1, 2, 3], [4]]},
        {"max_new_tokens": 3},
    ]

    def calls():
        for settings in variants:
            generate(model, ["xyz", [1] * 20, "one"], **{"max_new_tokens": 16, **settings})
        generate(model, [[1] * 32, [2], [3] * 9, [4]], max_new_tokens=11)  # three rows were padded to four
        list(stream(model, "b", max_new_tokens=9, seed=4))
        generate(model, "b", max_new_tokens=40)  # the programs of a stream

    assert compiled_in(caplog, calls) == []
    # another processor is another program
    assert compiled_in(caplog, lambda: generate(model, "b", logits_processor=lambda logits, context: logits))


@pytest.mark.slow
def test_two_hundred_calls_compile_twelve_programs(caplog):
    """Prompts of 1 to 900 tokens, any settings, seeds and lengths, at GPT-2's context."""
    config = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=300)
    model = model_of(config, init_params(config, 0))
    rng = np.random.default_rng(0)

    def calls():
        for _ in range(200):
            length = int(rng.integers(1, 901))
            generate(
                model,
                [rng.integers(0, 300, length).tolist()],
                max_new_tokens=int(rng.integers(1, min(300, 1025 - length))),
                temperature=float(rng.uniform(0, 2)),
                top_k=[None, 1, 5, 100][rng.integers(4)],
                top_p=float(rng.uniform(0.1, 1)),
                typical_p=float(rng.choice([0.5, 1.0])),
                repetition_penalty=float(rng.choice([1.0, 1.2])),
                no_repeat_ngram_size=int(rng.choice([0, 3])),
                seed=int(rng.integers(2**32)),
                stop_token_ids=range(300),  # what counts is compiled before the first token
            )

    assert 0 < len(compiled_in(caplog, calls)) <= 12
