"""Speculation gives the tokens of plain decoding, whatever is guessed, and counts its guesses."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from tiny_models import CONFIG, encode, random_model

from gpt2jax.generation import speculative
from gpt2jax.generation.generate import generate, stream
from gpt2jax.generation.logits_processors import TokenHistory
from gpt2jax.model.gpt2 import hidden_states, lm_head_weight, output_logits

TEXT = "one two three one two three one two"
GUESSES: list[dict[str, Any]] = [
    {"prompt_lookup_num_tokens": 5},
    {"draft_model": 1, "num_draft_tokens": 3},
    {"draft_model": 0, "num_draft_tokens": 3},
]


@pytest.fixture(scope="module")
def models():
    """The model and another one that knows nothing of it."""
    return random_model(0), random_model(5)


def with_draft(guesses, models):
    return {**guesses, "draft_model": models[guesses["draft_model"]]} if "draft_model" in guesses else guesses


@pytest.mark.slow
@pytest.mark.parametrize("guesses", GUESSES, ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False, "stop_token_ids": []},
        {"seed": 3, "top_k": 5, "temperature": 0.7, "stop_token_ids": []},
        {"seed": 4, "top_k": None, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
        {"seed": 5, "max_new_tokens": 1},
        {"seed": 6, "stop_token_ids": [87, 128, 130, 258], "min_new_tokens": 3},
    ],
    ids=str,
)
def test_tokens_are_those_of_plain_decoding(models, guesses, settings):
    settings = {"max_new_tokens": 40, **settings}
    prompts = [TEXT, "", [7, 7, 7, 7, 7]]
    # all these settings share their programs
    plain = generate(models[0], prompts, top_logprobs=2, batch_size=1, **settings)
    fast = generate(models[0], prompts, top_logprobs=2, **settings, **with_draft(guesses, models))
    for a, b in zip(plain, fast, strict=True):
        assert (a.token_ids, a.finish_reason, a.text) == (b.token_ids, b.finish_reason, b.text)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
        assert a.top_logprobs is not None and b.top_logprobs is not None
        assert [[i for i, _ in top] for top in a.top_logprobs] == [
            [i for i, _ in top] for top in b.top_logprobs
        ]
        assert 0 <= b.accepted <= b.drafted and a.drafted == 0
    if "min_new_tokens" in settings:
        assert {output.finish_reason for output in plain} == {"stop"}


@pytest.mark.slow
def test_guesses_are_counted(models):
    settings: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "stop_token_ids": []}
    (same,) = generate(models[0], TEXT, draft_model=models[0], num_draft_tokens=3, **settings)
    assert (same.accepted, same.drafted) == (30, 30)  # ten steps of three guesses and one more token
    (other,) = generate(models[0], TEXT, draft_model=models[1], num_draft_tokens=3, **settings)
    assert other.accepted < other.drafted / 2
    # a processor that makes the text go round: lookup guesses it once it has come round

    def round_and_round(logits, context):
        step = context.end[:, None] % 7
        return jnp.where(jnp.arange(logits.shape[-1]) == 10 + step, 0.0, -jnp.inf)

    (looked,) = generate(
        models[0], [[1]], prompt_lookup_num_tokens=5, logits_processor=round_and_round, **settings
    )
    assert looked.accepted >= 25 and looked.drafted - looked.accepted <= 5  # the last ones go beyond the end


@pytest.mark.slow
def test_stream_with_guesses(models):
    settings: dict[str, Any] = {"max_new_tokens": 30, "seed": 2, "stop_token_ids": []}
    (plain,) = generate(models[0], TEXT, **settings)
    assert "".join(stream(models[0], TEXT, prompt_lookup_num_tokens=5, **settings)) == plain.text
    assert (
        "".join(stream(models[0], TEXT, draft_model=models[1], num_draft_tokens=3, **settings)) == plain.text
    )


@pytest.mark.slow
@pytest.mark.thorough
def test_frequencies_are_those_of_the_model(models):
    """The third token over 1,200 seeds, against its exact distribution over the paths of two tokens before it."""
    model, draft = models
    ids = encode(model, "hello")
    logits = jax.jit(
        lambda ids: output_logits(
            hidden_states(model.params, CONFIG, ids)[:, -1], lm_head_weight(model.params)
        )
    )

    def filtered(text):
        row = np.asarray(logits(np.array([text])), np.float64)[0]
        best = np.argsort(-row)[:3]
        p = np.exp(row[best] - row[best].max())
        return list(zip(best.tolist(), p / p.sum(), strict=True))

    want = np.zeros(CONFIG.vocab_size)
    for a, pa in filtered(ids):
        for b, pb in filtered([*ids, a]):
            for c, pc in filtered([*ids, a, b]):
                want[c] += pa * pb * pc
    settings: dict[str, Any] = {"max_new_tokens": 3, "top_k": 3, "stop_token_ids": [], "num_draft_tokens": 3}
    outputs = generate(model, [ids], num_return_sequences=1200, draft_model=draft, **settings)
    counts = np.bincount([output.token_ids[2] for output in outputs], minlength=CONFIG.vocab_size)
    assert counts[want == 0].sum() == 0
    likely = want * 1200 >= 5
    got = np.append(counts[likely], counts[~likely].sum())
    expected = np.append(want[likely], want[~likely].sum()) * 1200
    assert stats.chisquare(got[expected > 0], expected[expected > 0]).pvalue > 1e-3


def test_look_up_takes_the_longest_and_the_latest():
    def guess(text, size=3, begin=0):
        token_ids = np.zeros((1, 32), np.int32)
        token_ids[0, : len(text)] = text
        ends = jnp.array([[begin], [len(text)], [len(text)]], jnp.int32)
        history = TokenHistory(jnp.asarray(token_ids), *ends)
        found = jax.jit(speculative.prompt_lookup, static_argnums=1)(history, size)
        return found.token_ids[0].tolist() if found.found else []

    assert guess([1, 2, 3, 4, 5, 1, 2]) == [3, 4, 5]
    assert guess([1, 2, 3, 9, 1, 2, 4, 9, 1, 2]) == [4, 9, 1]  # the latest
    assert guess([8, 1, 2, 3, 9, 7, 1, 2, 4, 9, 8, 1, 2]) == [3, 9, 7]  # three tokens alike before two
    assert guess([1, 2, 3]) == [] and guess([5]) == []
    assert guess([6, 6, 6, 6]) == [6, 6, 6]  # behind its end the text goes on as it did
    assert guess([3, 1, 2, 1, 2], 4) == [1, 2, 1, 2]
    assert guess([1, 2, 3, 4, 1, 2], begin=1) == []  # what lies before the text does not count


@pytest.mark.slow
def test_impossible_guesses_are_named(models):
    from gpt2jax.model.config import GPT2Config

    other = random_model(0, GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=280, n_positions=64))
    with pytest.raises(ValueError, match="draft_model must be a model with the 300 ids .* got one with 280"):
        generate(models[0], "a", draft_model=other)
    with pytest.raises(ValueError, match="num_draft_tokens must be a whole number from 1 to 65536, got 0"):
        generate(models[0], "a", draft_model=models[1], num_draft_tokens=0)
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens=2 does not go with draft_model"):
        generate(models[0], "a", draft_model=models[1], prompt_lookup_num_tokens=2)
