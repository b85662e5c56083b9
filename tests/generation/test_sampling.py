"""Sampling against a float64 NumPy reference, and the frequencies of what it draws."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from gpt2jax.generation import sampling
from gpt2jax.generation.config import GenerationConfig
from gpt2jax.generation.sampling import Filters, make_filters
from gpt2jax.generation.stages import Stages, make_stages

V = 500
sample = jax.jit(sampling.sample)
log_probability = jax.jit(sampling.log_probability)
full_weights = jax.jit(sampling.full_weights)
window_weights = jax.jit(sampling.window_weights)
draw = jax.jit(sampling.draw)
draw_from_all = jax.jit(sampling.draw_from_all)
top_k_of = jax.jit(jax.lax.top_k, static_argnums=1)


def reference(logits, *, temperature=1.0, top_k=None, top_p=1.0, min_p=0.0, typical_p=1.0):
    """What is drawn from, in float64: one sort, then the filters in their documented order."""
    logits = np.asarray(logits, np.float64)
    order = np.argsort(-logits, kind="stable")  # of equal logits the lowest id first
    p = np.exp((logits[order] - logits.max()) / temperature)
    p[len(p) if top_k is None else top_k :] = 0
    p /= p.sum()
    if top_p < 1:
        p[np.cumsum(p) - p >= top_p] = 0
    p[p < min_p * p[0]] = 0
    if typical_p < 1:
        p /= p.sum()
        information = -np.log(p, out=np.full_like(p, -np.inf), where=p > 0)
        distance = np.where(p > 0, np.abs(information - (p * np.where(p > 0, information, 0)).sum()), np.inf)
        nearest = np.argsort(distance, kind="stable")
        before = np.cumsum(p[nearest]) - p[nearest]
        p[nearest[before >= typical_p]] = 0
    result = np.zeros_like(p)
    result[order] = p / p.sum()
    return result


def filters(**settings) -> Filters:
    return make_filters(GenerationConfig(**{"top_k": None, **settings}))


def normal_logits(rows, scale=3.0, seed=0, vocab=V):
    return np.random.default_rng(seed).normal(0, scale, (rows, vocab)).astype(np.float32)


def normalised(weights):
    weights = np.asarray(weights, np.float64)
    return weights / weights.sum(-1, keepdims=True)


def keys_of(n, seed=0):
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(n))


CASES = [
    {},
    {"temperature": 0.7},
    {"temperature": 3.0, "top_p": 0.9},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 64, "top_p": 0.5},
    {"top_k": 40, "temperature": 1.3, "top_p": 0.95, "min_p": 0.05},
    {"top_k": 300, "top_p": 0.8},
    {"top_p": 0.3},
    {"top_p": 0.999},
    {"top_p": 1e-6},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_p": 0.9, "min_p": 0.02, "temperature": 0.5},
    {"top_k": V},
    {"top_k": V + 7},
    {"typical_p": 0.4},
    {"typical_p": 0.95, "temperature": 1.7, "top_p": 0.97},
    {"top_k": 30, "typical_p": 0.6, "min_p": 0.01},
]


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_whole_vocabulary_equals_the_reference(settings):
    logits = normal_logits(8)
    got = normalised(full_weights(logits, Filters(**_numbers(settings))))
    want = np.stack([reference(row, **settings) for row in logits])
    np.testing.assert_array_equal(got > 0, want > 0)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-12)


@pytest.mark.parametrize(
    "settings", [case for case in CASES if case.get("top_k", V) <= 64 and "typical_p" not in case], ids=str
)
def test_window_equals_the_reference(settings):
    logits = normal_logits(8, seed=1)
    values, ids = top_k_of(logits, 64)
    got = normalised(window_weights(values, Filters(**_numbers(settings))))
    want = np.stack([reference(row, **settings) for row in logits])
    want = np.take_along_axis(want, np.asarray(ids), 1)
    np.testing.assert_array_equal(got > 0, want > 0)
    np.testing.assert_allclose(got, want, rtol=2e-5)


def _numbers(settings):
    config = GenerationConfig(**{"top_k": None, **settings})
    return {**make_filters(config)._asdict(), "top_k": settings.get("top_k", 2**31 - 1)}


def test_reference_at_the_size_of_gpt2():
    """50,257 ids: sums over the whole vocabulary in float32 must not move the border of the nucleus."""
    logits = normal_logits(2, vocab=50257)
    for settings in ({"top_p": 0.9}, {"top_p": 0.99, "temperature": 1.5}, {"top_k": 1000, "top_p": 0.97}):
        got = np.asarray(full_weights(logits, Filters(**_numbers(settings)))) > 0
        want = np.stack([reference(row, **settings) > 0 for row in logits])
        # float32 sums are exact to about 1e-6 of the total: only tokens at the border may differ
        assert np.abs(got.sum(-1) - want.sum(-1)).max() <= 3, settings
        assert (got ^ want).sum() <= 6, settings


@pytest.mark.slow
@pytest.mark.parametrize("top_k", [1, 3, 7, 20])
def test_ties_keep_exactly_k_lowest_ids_first(top_k):
    logits = np.zeros((1, V), np.float32)
    logits[0, [400, 30, 20, 10]] = 2.0  # four best, then all equal
    want = sorted(
        [10, 20, 30, 400] + [i for i in range(V) if i not in (10, 20, 30, 400)][: max(0, top_k - 4)]
    )
    want = want if top_k >= 4 else [10, 20, 30, 400][:top_k]
    full = np.flatnonzero(full_weights(logits, filters(top_k=top_k)._replace(top_k=top_k))[0])
    values, ids = top_k_of(logits, 64)
    window = np.asarray(ids)[0][np.asarray(window_weights(values, filters()._replace(top_k=top_k)))[0] > 0]
    assert full.tolist() == want
    assert sorted(window.tolist()) == want


def test_ties_in_the_nucleus_keep_the_lowest_ids():
    logits = np.zeros((1, 8), np.float32)  # eight times 1/8: 0.3 is crossed by the third
    assert np.flatnonzero(full_weights(logits, filters(top_p=0.3))[0]).tolist() == [0, 1, 2]
    # a sum that reaches top_p exactly is enough
    assert np.flatnonzero(full_weights(logits, filters(top_p=0.25))[0]).tolist() == [0, 1]
    assert np.flatnonzero(window_weights(logits, filters(top_p=0.25))[0]).tolist() == [0, 1]


def test_minus_zero_equals_zero():
    logits = np.array([[-0.0, 0.0, -1.0]], np.float32)
    assert np.flatnonzero(full_weights(logits, filters()._replace(top_k=1))[0]).tolist() == [0]


@pytest.mark.slow
@pytest.mark.parametrize("window", [64, None])
@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.6, "top_p": 0.9}, {"temperature": 2.0, "min_p": 0.1}], ids=str
)
def test_frequencies(window, settings):
    """Chi-square of 40,000 draws; the keys are fixed, so the outcome is too."""
    settings = {**settings, "top_k": 12 if window else None}
    logits = normal_logits(1, scale=1.5, seed=4, vocab=40)
    rows = 40_000
    tokens = sample(jnp.repeat(logits, rows, 0), keys_of(rows, 5), filters(**settings))
    want = reference(logits[0], **settings)
    counts = np.bincount(tokens, minlength=40)
    assert counts[want == 0].sum() == 0
    seen = want > 0
    assert stats.chisquare(counts[seen], want[seen] * rows).pvalue > 1e-3


@pytest.mark.slow
def test_frequencies_across_blocks():
    """A vocabulary of many blocks: both stages of the draw together give each token its share."""
    logits = normal_logits(1, scale=2.0, seed=6, vocab=3000)
    want = reference(logits[0])
    uniforms = np.random.default_rng(0).random((20_000, 2), np.float32)
    tokens = draw_from_all(jnp.broadcast_to(full_weights(logits, filters()), (20_000, 3000)), uniforms)
    order = np.argsort(want)
    groups = np.array_split(order, 50)  # rare tokens are counted together
    counts = np.bincount(tokens, minlength=3000)
    got = np.array([counts[group].sum() for group in groups])
    expected = np.array([want[group].sum() for group in groups]) * 20_000
    big = expected >= 5
    got = np.append(got[big], got[~big].sum())
    expected = np.append(expected[big], expected[~big].sum())
    assert stats.chisquare(got, expected).pvalue > 1e-3


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-24])
def test_weight_zero_is_never_drawn(uniform):
    rng = np.random.default_rng(3)
    weights = rng.random((200, 1000), np.float32) * (rng.random((200, 1000)) < 0.02)
    weights[:, 0] = weights[:, -1] = 0
    weights[0] = 0
    weights[0, 777] = 1e-30
    drawn = draw(weights, np.full(200, uniform, np.float32))
    assert (np.take_along_axis(weights, np.asarray(drawn)[:, None], 1) > 0).all()
    drawn = draw_from_all(weights, np.full((200, 2), uniform, np.float32))
    assert (np.take_along_axis(weights, np.asarray(drawn)[:, None], 1) > 0).all()


def test_draw_is_the_inverse_of_the_cumulative_sum():
    weights = np.array([[0.0, 1.0, 2.0, 0.0, 5.0]], np.float32)
    at = {0.0: 1, 0.124: 1, 0.126: 2, 0.374: 2, 0.376: 4, 0.999: 4}
    for uniform, index in at.items():
        assert draw(weights, np.array([uniform], np.float32)).tolist() == [index]


@pytest.mark.slow
def test_greedy_takes_the_lowest_of_the_best():
    logits = normal_logits(4)
    logits[:, [33, 250]] = logits.max() + 1
    ways: list[dict[str, Any]] = [{"do_sample": False}, {"temperature": 0}, {"top_k": 1}]
    for settings in ways:
        tokens = sample(logits, keys_of(4), make_filters(GenerationConfig(**settings)))
        logprobs = log_probability(logits, tokens)
        assert tokens.tolist() == [33] * 4
        want = logits[:, 33] - np.log(np.exp(logits.astype(np.float64)).sum(-1))
        np.testing.assert_allclose(logprobs, want, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("window", [64, None])
def test_logprobs_are_those_of_the_model_before_the_filters(window):
    logits = normal_logits(16, seed=8)
    settings = {"temperature": 2.5, "top_k": 20 if window else None, "top_p": 0.9}
    tokens = sample(logits, keys_of(16), filters(**settings))
    logprobs = log_probability(logits, tokens)
    want = [np.log(reference(row)[token]) for row, token in zip(logits, tokens, strict=True)]
    np.testing.assert_allclose(logprobs, want, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("window", [64, None])
def test_a_row_draws_by_its_own_key_and_logits(window):
    logits, keys = normal_logits(6, scale=1.0), keys_of(6)
    settings = filters(top_k=50 if window else None)
    together = sample(logits, keys, settings)
    alone = [sample(logits[i : i + 1], keys[i : i + 1], settings)[0] for i in range(6)]
    assert together.tolist() == [int(token) for token in alone]
    assert len(set(together.tolist())) > 1


@pytest.mark.slow
def test_each_row_has_its_own_settings():
    """Greedy, small and large top-k, nucleus and typical side by side: each row as if it were alone."""
    logits, keys = normal_logits(len(CASES), scale=1.5), keys_of(len(CASES))
    rows = [filters(**case) for case in CASES]
    stacked = Filters(*(jnp.array(column) for column in zip(*rows, strict=True)))
    together = sample(logits, keys, stacked)
    alone = [sample(logits[i : i + 1], keys[i : i + 1], row)[0] for i, row in enumerate(rows)]
    assert together.tolist() == [int(token) for token in alone]
    weights = full_weights(logits, stacked)
    want = np.stack([reference(row, **case) for row, case in zip(logits, CASES, strict=True)])
    np.testing.assert_allclose(normalised(weights), want, rtol=2e-5, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1e-40, 1e-30, 1e-3])
def test_a_tiny_temperature_is_greedy_and_not_nan(temperature):
    logits = normal_logits(3)
    for window in (64, None):
        settings = filters(temperature=temperature, top_k=5 if window else None)
        tokens = sample(logits, keys_of(3), settings)
        assert tokens.tolist() == logits.argmax(-1).tolist()


def test_huge_logits_stay_finite():
    logits = np.array([[1e30, -1e30, 1e30, 0.0]], np.float32)
    for window in (64, None):
        tokens = sample(logits, keys_of(1), filters(top_k=4 if window else None))
        assert int(tokens[0]) in (0, 2) and np.isfinite(log_probability(logits, tokens)).all()


@pytest.mark.slow
def test_settings_compile_nothing_anew():
    program: Any = jax.jit(lambda *args: sampling.sample(*args))
    logits, keys = normal_logits(2), keys_of(2)
    for top_k in (1, 5, 64, 65, None, 10**12):
        for config in (
            GenerationConfig(top_k=top_k, temperature=0.0),
            GenerationConfig(top_k=top_k, min_p=0.1),
            GenerationConfig(top_k=top_k, top_p=0.9, typical_p=0.9),
        ):
            program(logits, keys, make_filters(config))
    assert program._cache_size() == 1


def test_numpy_numbers_are_settings_too():
    numbers: dict[str, Any] = {"temperature": np.float32(0.5), "top_k": np.int64(7), "top_p": np.float64(0.5)}
    config = GenerationConfig(**numbers, min_p=0)
    assert make_filters(config) == Filters(0.5, 7, 0.5, 0.0, 1.0)


# ---- programs that know their stages ----


@pytest.mark.slow
@pytest.mark.parametrize(
    "cases",
    [
        [{"do_sample": False}],
        [{"top_k": 5}, {"top_k": 16, "top_p": 0.8, "temperature": 1.7}, {"temperature": 0.0}],
        [{"top_k": 40}, {"top_k": 5}],
        [{"top_k": 300, "top_p": 0.8}, {"top_p": 0.3, "min_p": 0.01}, {"top_k": 5}, {"top_k": 1}],
        [{"typical_p": 0.4}, {"top_k": 30, "typical_p": 0.6}],
    ],
    ids=str,
)
def test_sample_by_draws_what_sample_draws(cases):
    """A program for the stages of its rows, and the one with all stages: the same tokens, ties included."""
    copies = 40
    configs = [GenerationConfig(**{"top_k": None, **case}) for case in cases] * copies
    columns: Any = [np.array(column) for column in zip(*map(make_filters, configs), strict=True)]
    rows = Filters(*columns)
    logits = np.round(normal_logits(len(configs), scale=2.0, seed=11), 1)  # many are equal
    keys = keys_of(len(configs), 3)
    stages = make_stages(configs, has_bad_words=False, vocab_size=V)
    tokens, largest = jax.jit(sampling.sample_by, static_argnums=0)(
        stages, logits, sampling.make_uniforms(keys), rows
    )
    assert tokens.tolist() == sample(logits, keys, rows).tolist()
    if largest is not None:
        np.testing.assert_array_equal(largest[:, 0], logits.max(-1))


def test_make_stages_holds_what_a_row_asks_for():
    def stages_of(*cases, has_bad_words=False):
        configs = [GenerationConfig(**case) for case in cases]
        return make_stages(configs, has_bad_words=has_bad_words, vocab_size=V)

    assert stages_of({}) == stages_of({"top_k": 16, "temperature": 0.3, "top_p": 0.5}) == Stages(window=16)
    assert stages_of({"do_sample": False}) == stages_of({"temperature": 0}) == Stages(window=1)
    assert stages_of({}, {"top_k": 17}, {"top_k": 1}) == Stages(window=64)
    assert stages_of({"top_k": None}) == Stages(window=0, has_vocabulary=True)
    assert stages_of({"top_k": V}) == Stages(window=0, has_vocabulary=True)
    assert stages_of({"top_k": 65}, {}) == Stages(window=16, has_vocabulary=True, has_top_k=True)
    assert stages_of({"top_k": None, "top_p": 0.5}).has_top_p
    assert stages_of({"typical_p": 0.5}) == Stages(
        window=0, has_vocabulary=True, has_top_k=True, has_typical_p=True
    )
    assert stages_of({"presence_penalty": 0.1}) == Stages(has_penalties=True)
    for forbids in ({"no_repeat_ngram_size": 2}, {"min_new_tokens": 1}):
        assert stages_of(forbids) == Stages(has_forbidden=True) == stages_of({}, has_bad_words=True)


def test_top_candidates_are_those_of_one_search():
    logits = np.round(normal_logits(8, seed=2), 0)  # most are equal to others
    values, ids = jax.jit(sampling.top_candidates, static_argnums=1)(logits, 64)
    want_values, want_ids = top_k_of(logits, 64)
    np.testing.assert_array_equal(values, want_values)
    np.testing.assert_array_equal(ids, want_ids)
