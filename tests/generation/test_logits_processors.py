"""Penalties beside plain Python on lists of tokens."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from gpt2jax.generation import logits_processors as penalties
from gpt2jax.generation.logits_processors import Penalties, TokenHistory

V, S = 12, 24
penalised = jax.jit(penalties.apply_penalties)
common_suffix = jax.jit(penalties.common_suffix)


def texts(rows=40, seed=0):
    """Texts of 1 to 20 tokens over few ids, so that they repeat themselves; what is around them is the same ids."""
    rng = np.random.default_rng(seed)
    token_ids = rng.integers(0, 4, (rows, S)).astype(np.int32)
    begin = rng.integers(0, 4, rows).astype(np.int32)
    end = begin + rng.integers(1, 20, rows).astype(np.int32)
    prompt_end = np.minimum(begin + rng.integers(1, 8, rows), end).astype(np.int32)
    return TokenHistory(token_ids, begin, prompt_end, end)  # pyright: ignore[reportArgumentType]  # NumPy's will do


def settings(history, **values) -> Penalties:
    rows = len(history.begin)
    off = {
        "repetition": 1.0,
        "presence": 0.0,
        "frequency": 0.0,
        "no_repeat_ngram_size": 0,
        "min_new_tokens": 0,
    }
    bad_words = np.full((4, 3), -1, np.int32)
    for i, word in enumerate(values.pop("bad_words", [])):
        bad_words[i, 3 - len(word) :] = word
    each = {
        name: np.broadcast_to(values.get(name, default), rows).astype(type(default))
        for name, default in off.items()
    }
    each = {
        name: value.astype(np.float32 if value.dtype == float else np.int32) for name, value in each.items()
    }
    return Penalties(**each, bad_words=bad_words)  # type: ignore[arg-type]


def reference(
    logits,
    text,
    new,
    stop_ids,
    steps,
    *,
    repetition,
    presence,
    frequency,
    no_repeat_ngram_size,
    min_new_tokens,
    bad_words,
):
    logits = logits.astype(np.float64)
    for token in set(text):
        logits[token] *= repetition if logits[token] < 0 else 1 / repetition
    for token in set(new):
        logits[token] -= presence + frequency * new.count(token)
    banned = set()
    n = no_repeat_ngram_size
    for i in range(len(text) - n + 1 if n else 0):
        if n == 1 or text[i : i + n - 1] == text[len(text) - n + 1 :]:
            banned.add(text[i + n - 1])
    for word in bad_words:
        if len(word) == 1 or text[-len(word) + 1 :] == list(word[:-1]):
            banned.add(word[-1])
    if steps < min_new_tokens:
        banned |= set(stop_ids)
    logits[list(banned)] = -np.inf
    return logits


@pytest.mark.slow
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"repetition": 1.7},
        {"presence": 0.4},
        {"frequency": -0.3},
        *({"no_repeat_ngram_size": n} for n in (1, 2, 3, 5)),
        {"bad_words": [[3], [0, 1], [1, 1, 2]]},
        {"min_new_tokens": 4},
        {
            "repetition": 0.8,
            "presence": 1.0,
            "frequency": 0.5,
            "no_repeat_ngram_size": 2,
            "bad_words": [[2, 2]],
        },
    ],
    ids=str,
)
def test_each_penalty(values):
    history = texts()
    logits = np.random.default_rng(1).normal(0, 2, (40, V)).astype(np.float32)
    stop_ids = np.array([5, 7, -1, -1], np.int32)
    steps = history.end - history.prompt_end
    got = np.asarray(penalised(logits, history, settings(history, **values), steps, stop_ids))
    off = {
        "repetition": 1.0,
        "presence": 0.0,
        "frequency": 0.0,
        "no_repeat_ngram_size": 0,
        "min_new_tokens": 0,
    }
    for row in range(40):
        begin, prompt_end, end = (int(part[row]) for part in history[1:])
        text = history.token_ids[row].tolist()
        want = reference(
            logits[row],
            text[begin:end],
            text[prompt_end:end],
            [5, 7],
            steps[row],
            **{**off, "bad_words": [], **values},
        )
        np.testing.assert_allclose(got[row], want, rtol=1e-6)
    assert (got != logits).any() == bool(values)


def test_rows_have_their_own():
    history = texts()
    logits = np.random.default_rng(2).normal(0, 2, (40, V)).astype(np.float32)
    size = np.arange(40) % 4
    stop_ids, steps = np.full(4, -1, np.int32), np.zeros(40, np.int32)
    together = penalised(logits, history, settings(history, no_repeat_ngram_size=size), steps, stop_ids)
    for n in range(4):
        alone = penalised(logits, history, settings(history, no_repeat_ngram_size=n), steps, stop_ids)
        np.testing.assert_array_equal(together[size == n], alone[size == n])


def test_common_suffix():
    history = texts(seed=3)
    got = np.asarray(common_suffix(history, 4))
    for row in range(40):
        begin, _, end = (int(part[row]) for part in history[1:])
        text = history.token_ids[row].tolist()
        for slot in range(begin, end):
            length = 0
            while (
                length < min(4, slot - begin, end - begin)
                and text[slot - 1 - length] == text[end - 1 - length]
            ):
                length += 1
            assert got[row, slot] == length
