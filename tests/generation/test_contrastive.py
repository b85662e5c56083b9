"""Contrastive search beside a plain loop over the forward pass, by the words of the paper."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import CONFIG, encode, random_model

from gpt2jax.generation.generate import generate, stream
from gpt2jax.model.gpt2 import hidden_states, lm_head_weight, output_logits

PROMPTS = ["one two three one two three", "", "a", [7, 7, 7, 8]]


@pytest.fixture(scope="module")
def model():
    return random_model(2)


@functools.partial(jax.jit, static_argnums=1)
def run(params, config, token_ids):
    """Hidden states [T, D] and logits [T, V] of one text."""
    hidden = hidden_states(params, config, token_ids[None])
    return hidden[0], output_logits(hidden, lm_head_weight(params))[0]


def naive(model, ids: list[int], count: int, top_k: int, alpha: float) -> tuple[list[int], list[float]]:
    """Every candidate runs through the whole model again."""

    def states(text):
        padded = np.zeros(CONFIG.n_positions, np.int32)
        padded[: len(text)] = text
        hidden, logits = run(model.params, model.config, jnp.asarray(padded))
        return np.asarray(hidden, np.float64)[: len(text)], np.asarray(logits, np.float64)[len(text) - 1]

    text, logprobs = list(ids), []
    for _ in range(count):
        _, logits = states(text)
        logprob = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        scores = {}
        for token in np.argsort(-logprob)[:top_k].tolist():
            hidden, _ = states([*text, token])
            unit = hidden / np.linalg.norm(hidden, axis=-1, keepdims=True)
            likeness = (unit[:-1] @ unit[-1]).max()
            scores[token] = (1 - alpha) * np.exp(logprob[token]) - alpha * likeness
        best = max(scores, key=lambda token: scores[token])
        text.append(best)
        logprobs.append(float(logprob[best]))
    return text[len(ids) :], logprobs


@pytest.mark.slow
@pytest.mark.parametrize(("top_k", "alpha"), [(4, 0.6), (7, 0.2), (3, 1.0)])
def test_tokens_are_those_of_the_paper(model, top_k, alpha):
    """Prompts of different lengths together."""
    outputs = generate(model, PROMPTS, max_new_tokens=9, top_k=top_k, penalty_alpha=alpha, stop_token_ids=[])
    for output in outputs:
        tokens, logprobs = naive(model, output.prompt_ids, 9, top_k, alpha)
        assert output.token_ids == tokens
        np.testing.assert_allclose(output.logprobs, logprobs, atol=1e-4)


@pytest.mark.slow
def test_one_candidate_or_no_weight_is_greedy(model):
    greedy = generate(model, PROMPTS, max_new_tokens=9, do_sample=False)
    for settings in ({"top_k": 1, "penalty_alpha": 0.9}, {"top_k": 4, "penalty_alpha": 1e-9}):
        outputs = generate(model, PROMPTS, max_new_tokens=9, **settings)
        assert [a.token_ids for a in outputs] == [b.token_ids for b in greedy]


@pytest.mark.slow
def test_all_that_generate_offers(model):
    """Stops, penalties, log-probabilities of others, going past the context, and pieces as they come."""
    settings = {"max_new_tokens": 12, "top_k": 4, "penalty_alpha": 0.5}
    [free] = generate(model, PROMPTS[0], stop_token_ids=[], **settings)
    [stopped] = generate(model, PROMPTS[0], stop_token_ids=[free.token_ids[5]], **settings)
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(free.token_ids[5])]
    [other] = generate(
        model, PROMPTS[0], stop_token_ids=[], bad_words=[free.token_ids[:1]], top_logprobs=3, **settings
    )
    assert free.token_ids[0] not in other.token_ids
    assert other.top_logprobs is not None and [len(top) for top in other.top_logprobs] == [3] * 12
    pieces = stream(model, PROMPTS[0], stop_token_ids=[], **settings)
    assert "".join(pieces) == free.text
    long = (encode(model, "one two") * 40)[: CONFIG.n_positions - 4]
    [slid] = generate(model, long, stop_token_ids=[], overflow="sliding_window", **settings)
    assert len(slid.token_ids) == 12
