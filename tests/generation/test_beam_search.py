"""Beam search beside a search of all texts there are, greedy decoding, and itself in batches."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import CONFIG, random_model, random_params

from gpt2jax.generation.beam_search import search
from gpt2jax.generation.generate import beam_search, generate
from gpt2jax.generation.outputs import Generation
from gpt2jax.language_model import LanguageModel
from gpt2jax.model.config import GPT2Config
from gpt2jax.model.gpt2 import hidden_states, lm_head_weight, output_logits

VOCAB, LENGTH = 6, 3
SMALL = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=VOCAB, n_positions=16)
PROMPT, STOP = [2, 0, 4], 5
PROMPTS = ["a", "", "hello world", [7, 7, 7, 7, 7, 8, 9]]


def scores_of(beams: list[Generation]) -> list[float]:
    """Return the score of each beam."""
    return [beam.score for beam in beams if beam.score is not None]


@pytest.fixture(scope="module")
def model():
    return random_model(3)


@pytest.fixture(scope="module")
def small():
    return LanguageModel(SMALL, random_params(SMALL, 4, noise=0.6))


@jax.jit
def log_probabilities(params, token_ids):
    hidden = hidden_states(params, SMALL, token_ids)
    return jax.nn.log_softmax(output_logits(hidden, lm_head_weight(params)))


@pytest.fixture(scope="module")
def every_text(small):
    """(tokens, sum of log-probabilities) of all continuations of three tokens."""
    texts = np.array(list(itertools.product(range(VOCAB), repeat=LENGTH)))
    ids = np.concatenate([np.tile(PROMPT, (len(texts), 1)), texts], axis=1)
    logprobs = np.asarray(log_probabilities(small.params, jnp.asarray(ids)))
    steps = np.arange(LENGTH)
    each = logprobs[np.arange(len(texts))[:, None], len(PROMPT) - 1 + steps, texts]
    return texts, np.cumsum(each, axis=1)


@pytest.mark.slow
def test_beams_for_all_beginnings_find_the_best_of_all_texts(small, every_text):
    texts, sums = every_text
    beams = VOCAB ** (LENGTH - 1)
    [found] = beam_search(
        small,
        PROMPT,
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=LENGTH,
        length_penalty=0.0,
        stop_token_ids=[],
    )
    order = np.argsort(-sums[:, -1], kind="stable")[:beams]
    assert [beam.token_ids for beam in found] == texts[order].tolist()
    np.testing.assert_allclose(scores_of(found), sums[order, -1], atol=1e-5)
    assert {beam.finish_reason for beam in found} == {"length"}


@pytest.mark.slow
@pytest.mark.parametrize("length_penalty", [0.0, 0.7, 1.0, 2.5])
def test_a_stop_token_and_the_length_penalty(small, every_text, length_penalty):
    """All texts that end with the stop token or at the greatest length, by score."""
    texts, sums = every_text
    scores: dict[tuple[int, ...], float] = {}
    for text, total in zip(texts.tolist(), sums, strict=True):
        length = text.index(STOP) + 1 if STOP in text else LENGTH
        scores[tuple(text[:length])] = total[length - 1] / length**length_penalty
    best = sorted(scores, key=lambda text: -scores[text])[:8]
    [found] = beam_search(
        small,
        PROMPT,
        num_beams=VOCAB ** (LENGTH - 1),
        num_return_sequences=8,
        max_new_tokens=LENGTH,
        length_penalty=length_penalty,
        early_stopping="never",
        stop_token_ids=[STOP],
    )
    assert [beam.token_ids for beam in found] == [[i for i in text if i != STOP] for text in best]
    np.testing.assert_allclose(scores_of(found), [scores[text] for text in best], atol=1e-5)
    assert [beam.finish_reason == "stop" for beam in found] == [text[-1] == STOP for text in best]


@pytest.mark.slow
def test_one_beam_is_greedy(model):
    outputs = generate(model, PROMPTS, max_new_tokens=12, do_sample=False)
    beams = beam_search(model, PROMPTS, num_beams=1, max_new_tokens=12)
    for output, [beam] in zip(outputs, beams, strict=True):
        assert (beam.token_ids, beam.text, beam.prompt, beam.prompt_ids, beam.finish_reason) == (
            output.token_ids,
            output.text,
            output.prompt,
            output.prompt_ids,
            output.finish_reason,
        )
        assert str(beam) == str(output)
        if beam.finish_reason == "length":
            assert beam.score is not None
            np.testing.assert_allclose(beam.score, np.mean(output.logprobs), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_prompts_together_and_alone(model, early_stopping):
    settings: dict[str, Any] = {
        "num_beams": 3,
        "num_return_sequences": 3,
        "max_new_tokens": 10,
        "early_stopping": early_stopping,
        "stop_token_ids": list(range(0, 300, 25)),
    }
    together = beam_search(model, PROMPTS, **settings)
    for prompt, beams in zip(PROMPTS, together, strict=True):
        [alone] = beam_search(model, prompt, batch_size=1, **settings)
        assert [beam.token_ids for beam in beams] == [beam.token_ids for beam in alone]
        np.testing.assert_allclose(scores_of(beams), scores_of(alone), atol=1e-5)
        assert len(scores_of(beams)) == 3
        assert scores_of(beams) == sorted(scores_of(beams), reverse=True)
    assert any(beam.finish_reason == "stop" for beams in together for beam in beams)


@pytest.mark.slow
def test_early_stopping_ends_with_the_first_full_set(model):
    """Each token ends a text, so the first step has all that is wanted."""
    [beams] = beam_search(
        model,
        "a",
        num_beams=2,
        num_return_sequences=2,
        max_new_tokens=9,
        early_stopping=True,
        stop_token_ids=range(300),
    )
    assert [(beam.token_ids, beam.finish_reason) for beam in beams] == [([], "stop"), ([], "stop")]


@pytest.mark.slow
def test_forbidden_tokens(model):
    prompt = [5, 6, 7, 5, 6]
    [[free]] = beam_search(model, prompt, max_new_tokens=20, stop_token_ids=[])
    bad = free.token_ids[1]
    [beams] = beam_search(
        model,
        prompt,
        num_return_sequences=4,
        max_new_tokens=20,
        no_repeat_ngram_size=2,
        bad_words=[[bad]],
        min_new_tokens=20,
        stop_token_ids=list(range(0, 300, 2)),
    )
    for beam in beams:
        text = prompt + beam.token_ids
        pairs = list(itertools.pairwise(text))
        assert len(set(pairs[1:])) == len(pairs) - 1 and (5, 6) not in pairs[4:]
        assert bad not in beam.token_ids and len(beam.token_ids) >= 19


@pytest.mark.slow
def test_settings_compile_nothing(model):
    beam_search(model, "one two", num_beams=2, max_new_tokens=4)
    program: Any = search
    before = program._cache_size()
    for prompt, penalty, early in (("two", 0.3, True), ("two one", -1.0, "never"), ("a b c", 2.0, False)):
        beam_search(
            model, prompt, num_beams=2, max_new_tokens=7, length_penalty=penalty, early_stopping=early
        )
    assert program._cache_size() == before


@pytest.mark.slow
def test_length_by_max_length_and_another_dtype(model):
    [[beam]] = beam_search(model, [1, 2, 3], max_length=8, stop_token_ids=[], dtype="int8")
    assert len(beam.token_ids) == 5


@pytest.mark.slow
def test_model_without_tokenizer(model):
    plain = dataclasses.replace(model, tokenizer=None)
    [[beam]] = beam_search(plain, [1, 2, 3], max_new_tokens=4, stop_token_ids=[])
    assert (beam.text, beam.prompt, len(beam.token_ids)) == ("", "", 4)


@pytest.mark.slow
def test_whole_numbers_of_numpy(model):
    numbers: dict[str, Any] = {
        "num_beams": 2,
        "num_return_sequences": 2,
        "max_new_tokens": 3,
        "batch_size": 4,
    }
    of_numpy: dict[str, Any] = {name: np.int64(value) for name, value in numbers.items()}
    assert beam_search(model, "a", **of_numpy) == beam_search(model, "a", **numbers)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 0}, "num_beams must be a whole number from 1 to 65536, got 0"),
        ({"num_return_sequences": 5}, "num_return_sequences must be at most num_beams=4, got 5"),
        ({"length_penalty": float("nan")}, "length_penalty must be a finite number, got nan"),
        ({"early_stopping": "soon"}, "early_stopping must be one of True, False, never, got 'soon'"),
        (
            {"max_new_tokens": CONFIG.n_positions},
            r"context \(n_positions\) is \d+: ask for at most \d+ new ones$",
        ),
        ({"stop_token_ids": [300]}, "stop_token_ids"),
    ],
    ids=str,
)
def test_impossible_settings_are_named(model, settings, message):
    with pytest.raises(ValueError, match=message):
        beam_search(model, "a", **settings)
