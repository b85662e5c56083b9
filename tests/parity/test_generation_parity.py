"""Generation beside transformers: greedy tokens, their log-probabilities, and the filters of sampling."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2jax.generation.config import GenerationConfig
from gpt2jax.generation.generate import generate
from gpt2jax.generation.logits_processors import Penalties, TokenHistory, apply_penalties
from gpt2jax.generation.sampling import full_weights, make_filters
from gpt2jax.language_model import LanguageModel
from gpt2jax.loading import load
from gpt2jax.weights.hf import load_hf

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TINY: dict[str, Any] = {"vocab_size": 211, "n_positions": 40, "n_embd": 24, "n_layer": 2, "n_head": 3}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "one head": {"n_head": 1, "n_layer": 1},
    "narrow heads": {"n_embd": 35, "n_head": 7, "n_layer": 3},
    "wide mlp, untied": {"n_inner": 53, "tie_word_embeddings": False},
    "exact gelu, other scales": {"activation_function": "gelu", "scale_attn_by_inverse_layer_idx": True},
}


@pytest.fixture(params=VARIANTS, scope="module")
def pair(request, tmp_path_factory):
    end = {"bos_token_id": 210, "eos_token_id": 210}
    return make_pair({**TINY, **end, **VARIANTS[request.param]}, 1, tmp_path_factory.mktemp("hf"))


def make_pair(shape: dict[str, Any], seed: int, folder):
    """The same random model in transformers and here; every leaf random, biases and LayerNorms too."""
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.copy_(noise + 1 if "ln_" in name and name.endswith("weight") else noise)
    theirs.save_pretrained(folder)
    config, params = load_hf(folder)[:2]
    return theirs, LanguageModel(config, params)


def prompts_of(vocab_size):
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, vocab_size, length).tolist() for length in (1, 7, 16, 23)]
    prompts[1][0], prompts[2][3] = 0, 210  # ordinary ids that other code takes for padding
    return prompts


def continue_with_torch(model, prompt, count=16, **settings):
    """transformers' greedy continuation: ids, and log-probabilities in float64."""
    with torch.no_grad():
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
            **settings,
        )
    tokens = output.sequences[0, len(prompt) :]
    logprobs = torch.log_softmax(torch.cat(output.logits).double(), -1).gather(1, tokens[:, None])[:, 0]
    return tokens.tolist(), logprobs.numpy()


def test_greedy_tokens_and_logprobs(pair):
    """A batch of prompts of 1 to 23 tokens, first without a stop, then with one that is known to come."""
    theirs, ours = pair
    prompts = prompts_of(211)
    settings = {"max_new_tokens": 16, "do_sample": False}
    outputs = generate(ours, prompts, stop_token_ids=[], **settings)
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens, logprobs = continue_with_torch(theirs, prompt, eos_token_id=None)
        assert output.token_ids == tokens
        np.testing.assert_allclose(output.logprobs, logprobs, atol=1e-4)
    stop = outputs[0].token_ids[6]
    stopped = generate(ours, prompts, stop_token_ids=[stop], **settings)
    assert stopped[0].finish_reason == "stop"
    for prompt, output in zip(prompts, stopped, strict=True):
        tokens, _ = continue_with_torch(theirs, prompt, eos_token_id=stop)
        ended = tokens[-1] == stop
        assert output.token_ids == (tokens[:-1] if ended else tokens)
        assert output.finish_reason == ("stop" if ended else "length")


@pytest.mark.parametrize("seed", range(20))
def test_a_hundred_tokens_of_an_odd_shape(seed, tmp_path):
    rng = np.random.default_rng(seed)
    heads = int(rng.integers(1, 6))
    vocab_size = int(rng.integers(50, 400))
    shape = {
        "vocab_size": vocab_size,
        "n_positions": int(rng.integers(112, 160)),
        "n_embd": heads * int(rng.integers(3, 14)),
        "n_layer": int(rng.integers(1, 4)),
        "n_head": heads,
        "n_inner": int(rng.integers(5, 90)) if seed % 2 else None,
        "tie_word_embeddings": bool(seed % 3),
        "activation_function": ("gelu_new", "gelu", "relu", "silu")[seed % 4],
        "scale_attn_by_inverse_layer_idx": seed % 5 == 0,
        "bos_token_id": vocab_size - 1,
        "eos_token_id": vocab_size - 1,
    }
    theirs, ours = make_pair(shape, seed, tmp_path)
    prompt = rng.integers(0, vocab_size, rng.integers(1, 12)).tolist()
    [output] = generate(ours, prompt, max_new_tokens=100, do_sample=False, stop_token_ids=[])
    tokens, logprobs = continue_with_torch(theirs, prompt, 100, eos_token_id=None)
    assert output.token_ids == tokens
    np.testing.assert_allclose(output.logprobs, logprobs, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7, "top_k": 10},
        {"temperature": 1.4, "top_p": 0.8},
        {"top_k": 100, "top_p": 0.9, "min_p": 0.02},
        {"temperature": 0.5, "min_p": 0.1},
        {"typical_p": 0.7},
        {"temperature": 1.3, "top_k": 60, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.5},
    ],
    ids=str,
)
def test_filters_keep_the_tokens_that_transformers_keeps(settings):
    """The processors in the order in which transformers' generate applies them."""
    logits = np.random.default_rng(5).normal(0, 2, (6, 400)).astype(np.float32)
    scores = torch.from_numpy(logits.copy()) / settings.get("temperature", 1.0)
    for name, processor in (
        ("top_k", transformers.TopKLogitsWarper),
        ("top_p", transformers.TopPLogitsWarper),
        ("min_p", transformers.MinPLogitsWarper),
        ("typical_p", transformers.TypicalLogitsWarper),
    ):
        if name in settings:
            scores = processor(settings[name])(None, scores)
    filters = make_filters(GenerationConfig(**{"top_k": None, **settings}))
    weights = np.asarray(full_weights(jnp.asarray(logits), filters))
    np.testing.assert_allclose(weights / weights.sum(-1, keepdims=True), scores.softmax(-1), atol=1e-6)
    np.testing.assert_array_equal(weights > 0, np.isfinite(scores.numpy()))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"repetition": 1.4}, lambda: transformers.RepetitionPenaltyLogitsProcessor(1.4)),
        ({"no_repeat_ngram_size": 1}, lambda: transformers.NoRepeatNGramLogitsProcessor(1)),
        ({"no_repeat_ngram_size": 3}, lambda: transformers.NoRepeatNGramLogitsProcessor(3)),
        (
            {"bad_words": [[3], [0, 1], [2, 2, 1]]},
            lambda: transformers.NoBadWordsLogitsProcessor([[3], [0, 1], [2, 2, 1]]),
        ),
        (
            {"min_new_tokens": 9},
            lambda: transformers.MinNewTokensLengthLogitsProcessor(4, 9, [5, 7], device="cpu"),
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "processor",
)
def test_penalties_are_those_of_transformers(ours, theirs):
    """Texts of 12 tokens over four ids, the first four of them the prompt."""
    rng = np.random.default_rng(0)
    token_ids = rng.integers(0, 4, (16, 12)).astype(np.int32)
    logits = rng.normal(0, 2, (16, 20)).astype(np.float32)
    want = theirs()(torch.from_numpy(token_ids).long(), torch.from_numpy(logits.copy())).numpy()
    rows: Any = np.ones(16, np.int32)
    bad_words: Any = np.full((4, 3), -1, np.int32)
    for i, word in enumerate(ours.get("bad_words", [])):
        bad_words[i, 3 - len(word) :] = word
    settings = Penalties(
        rows * np.float32(ours.get("repetition", 1)),
        rows * np.float32(0),
        rows * np.float32(0),
        rows * ours.get("no_repeat_ngram_size", 0),
        rows * ours.get("min_new_tokens", 0),
        bad_words,
    )
    context = TokenHistory(token_ids, rows * 0, rows * 4, rows * 12)  # type: ignore[arg-type]
    context, settings, steps = jax.tree.map(jnp.asarray, (context, settings, rows * 8))
    got = apply_penalties(jnp.asarray(logits), context, settings, steps, jnp.array([5, 7, -1, -1]))
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.7, "max_length": 30},
        {"no_repeat_ngram_size": 2, "max_new_tokens": 12, "min_new_tokens": 3},
        {"min_length": 20, "max_length": 30, "bad_words_ids": [[5], [7, 8]], "suppress_tokens": [9]},
        {"num_beams": 3, "length_penalty": 0.5, "early_stopping": True, "max_new_tokens": 9},
    ],
    ids=str,
)
def test_generation_config_beside_the_weights(settings, tmp_path):
    """The same folder in both, and no setting in the call, except that ours would sample."""
    make_pair({**TINY, "bos_token_id": 210, "eos_token_id": [210, 3]}, 1, tmp_path)
    path = tmp_path / "generation_config.json"
    path.write_text(
        json.dumps({**settings, "bos_token_id": 210, "eos_token_id": [210, 3], "pad_token_id": 0})
    )
    theirs, ours = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval(), load(tmp_path)
    for prompt in prompts_of(211):
        tokens = theirs.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long)
        )[0, len(prompt) :].tolist()
        [output] = generate(ours, prompt, do_sample=False)
        assert output.token_ids == (tokens[:-1] if tokens[-1] in (210, 3) else tokens)
    ours.save(tmp_path / "again")
    again = transformers.GenerationConfig.from_pretrained(tmp_path / "again")
    assert again.to_diff_dict() == theirs.generation_config.to_diff_dict()
