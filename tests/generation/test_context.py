"""Texts at the end of the context and beyond, caches that grow, beginnings that prompts share."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from generation_models import CONFIG, LONG, TOKENIZER, model_of, steep_model

from gpt2jax.generation.generate import generate, stream
from gpt2jax.generation.prefill import next_cache_length
from gpt2jax.model.gpt2 import init_params


@pytest.fixture(scope="module")
def model():
    return steep_model()


@pytest.mark.slow
def test_a_row_of_sixteen_is_its_single_run(model):
    rng = np.random.default_rng(8)
    prompts = [rng.integers(0, 300, length).tolist() for length in rng.integers(1, 40, 16)]
    settings = {"max_new_tokens": 20, "do_sample": False, "stop_token_ids": []}
    for prompt, row in zip(prompts, generate(model, prompts, **settings), strict=True):
        [alone] = generate(model, prompt, **settings)
        assert row.token_ids == alone.token_ids
        np.testing.assert_allclose(row.logprobs, alone.logprobs, atol=1e-4)


@pytest.mark.slow
@pytest.mark.thorough
def test_a_batch_that_outgrows_its_cache_again_and_again():
    """64, 128 and 192 positions for several rows; 256 for one."""
    config = dataclasses.replace(CONFIG, n_layer=1, n_positions=256)
    model = model_of(config, jax.tree.map(lambda x: x * 6, init_params(config, 1)))
    settings = {"max_new_tokens": 150, "do_sample": False, "stop_token_ids": []}
    prompts = ["a", "hello world"]
    for prompt, row in zip(prompts, generate(model, prompts, **settings), strict=True):
        [alone] = generate(model, prompt, **settings)
        assert row.token_ids == alone.token_ids
    sizes = [64]
    while sizes[-1] < 1024:
        sizes.append(next_cache_length(sizes[-1], 2))
    assert sizes == [64, 128, 192, 256, 384, 512, 768, 1024]
    assert next_cache_length(256, 1) == 512


def test_sliding_past_the_context(model):
    """As generating in parts by hand, each from the last half of the text before it."""
    (output,) = generate(
        model, LONG, max_new_tokens=150, do_sample=False, stop_token_ids=[], overflow="sliding_window"
    )
    text, want = TOKENIZER.encode(LONG), []
    while len(want) < 150:
        new = min(150 - len(want), 64 - len(text))
        (part,) = generate(model, [text], max_new_tokens=new, do_sample=False, stop_token_ids=[])
        want += part.token_ids
        text = (text + part.token_ids)[-32:]
    assert output.token_ids == want
    settings: dict[str, Any] = {
        "max_new_tokens": 90,
        "stop_token_ids": [],
        "overflow": "sliding_window",
        "seed": 4,
    }
    (sampled,) = generate(model, "hello", **settings)
    assert len(set(sampled.token_ids[-40:])) > 5 and sampled.finish_reason == "length"
    assert "".join(stream(model, "hello", **settings)) == sampled.text
    together = generate(model, ["hello", LONG], **{**settings, "max_new_tokens": [90][0]})
    assert together[0].token_ids == sampled.token_ids
    with pytest.raises(ValueError, match="overflow='sliding_window'"):
        generate(model, LONG, max_new_tokens=150)


@pytest.mark.parametrize("length", [63, 64, 65, 150])
def test_a_prompt_of_the_context_and_more_slides_at_once(model, length):
    prompt = np.random.default_rng(0).integers(0, 299, length).tolist()
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "stop_token_ids": []}
    (output,) = generate(model, prompt, overflow="sliding_window", **settings)
    before = [*prompt, *output.token_ids[: 64 - length]] if length < 64 else prompt
    (rest,) = generate(model, before[-32:], **settings)
    assert output.token_ids[len(before) - length :] == rest.token_ids[: 5 - (len(before) - length)]
    assert output.prompt_ids == prompt and len(output.token_ids) == 5


@pytest.mark.slow
def test_a_context_of_one_token_cannot_slide():
    config = dataclasses.replace(CONFIG, n_positions=1)
    with pytest.raises(ValueError, match="context .n_positions. is 1"):
        generate(model_of(config, init_params(config)), [1], max_new_tokens=3, overflow="sliding_window")


def test_a_shared_beginning_is_computed_once(model, monkeypatch):
    """Rows that begin alike give what they give alone, and their beginning goes through the model for one row."""
    from gpt2jax.generation import prefill

    beginning = list(range(20, 45))
    prompts = [beginning + [1, 2], beginning + [3], beginning + [4] * 9]
    alone = [generate(model, [prompt], max_new_tokens=8, seed=i)[0] for i, prompt in enumerate(prompts)]
    computed = []

    def counted(spec, params, token_ids, *args):
        computed.append(token_ids.shape[0])
        return prefill_chunk(spec, params, token_ids, *args)

    prefill_chunk = prefill.prefill_chunk
    monkeypatch.setattr(prefill, "prefill_chunk", counted)
    together = generate(model, prompts, max_new_tokens=8)
    assert [output.token_ids for output in together] == [output.token_ids for output in alone]
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
    assert computed == [1, 1, 1, 1, 4]  # 25 tokens in chunks of 8, then what differs
    computed.clear()
    generate(model, [beginning], num_return_sequences=4, max_new_tokens=2)
    assert computed == [1, 1, 1]
