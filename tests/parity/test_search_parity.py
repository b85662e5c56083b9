"""Beam search beside transformers: tokens and scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gpt2jax.generation.generate import beam_search
from gpt2jax.loading import load

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SHAPE: dict[str, Any] = {"vocab_size": 97, "n_positions": 48, "n_embd": 24, "n_layer": 2, "n_head": 3}
STOP = 96
STOPS = list(range(0, 97, 8))  # some texts end early, others at the greatest length


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A random model in both."""
    torch.manual_seed(3)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**SHAPE, bos_token_id=STOP, eos_token_id=STOP)
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    folder = tmp_path_factory.mktemp("hf")
    theirs.save_pretrained(folder)
    return theirs, load(folder)


def beams_of_transformers(model, prompt: list[int], count: int, settings: dict[str, Any]):
    """Tokens without the stop token, and scores."""
    with torch.no_grad():
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            pad_token_id=0,
            num_return_sequences=count,
            return_dict_in_generate=True,
            output_scores=True,
            **settings,
        )
    found, ended = [], settings.get("eos_token_id", [STOP])
    for row in output.sequences[:, len(prompt) :].tolist():
        at = next((i for i, token in enumerate(row) if token in ended), len(row))
        found.append(row[:at])
    return found, output.sequences_scores.numpy()


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"length_penalty": 2.0}, {"length_penalty": 2.0}),
        ({"length_penalty": 0.0}, {"length_penalty": 0.0}),
        ({"length_penalty": -1.0}, {"length_penalty": -1.0}),
        ({"stop_token_ids": STOPS}, {"eos_token_id": STOPS}),
        ({"stop_token_ids": STOPS, "length_penalty": 2.0}, {"eos_token_id": STOPS, "length_penalty": 2.0}),
        (
            {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
            {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
        ),
        ({"min_new_tokens": 6}, {"min_new_tokens": 6}),
        ({"bad_words": [[5], [6, 7]]}, {"bad_words_ids": [[5], [6, 7]]}),
    ],
    ids=str,
)
def test_tokens_and_scores(pair, ours, theirs, early_stopping):
    """Prompts of 1 to 20 tokens in one batch; each alone in transformers."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, STOP, length).tolist() for length in (1, 4, 9, 20)]
    shared = {"num_beams": 4, "max_new_tokens": 14, "early_stopping": early_stopping}
    results = beam_search(pair[1], prompts, num_return_sequences=3, **shared, **ours)
    for prompt, beams in zip(prompts, results, strict=True):
        tokens, scores = beams_of_transformers(pair[0], prompt, 3, {**shared, **theirs})
        assert [beam.token_ids for beam in beams] == tokens
        np.testing.assert_allclose([beam.score or 0.0 for beam in beams], scores, atol=1e-4)
    if "stop_token_ids" in ours and not early_stopping:
        assert {beam.finish_reason for beams in results for beam in beams} == {"stop", "length"}
