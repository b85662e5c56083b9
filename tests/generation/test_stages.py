"""The structure of programs that know their stages, as they are for a GPU: traced on the CPU."""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np
import pytest

from gpt2jax.generation.cached_model import decoding_precision, prepare_decoding_params
from gpt2jax.generation.config import GenerationConfig
from gpt2jax.generation.decoding import DecoderSpec, initial_state, make_decode_params
from gpt2jax.generation.kv_cache import init_cache
from gpt2jax.generation.requests import PromptState
from gpt2jax.generation.stages import Stages, make_stages
from gpt2jax.generation.strategy import Sampling, decode
from gpt2jax.model.config import GPT2Config
from gpt2jax.model.gpt2 import init_params
from gpt2jax.ops.device import Device

CONFIG = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=300, n_positions=64)


def lowered(stages: Stages | None, config: GenerationConfig, batch: int = 2) -> str:
    """Return the decoding loop before compilation, as text."""
    precision = decoding_precision("bfloat16", device=Device.of_backend("gpu"))
    params = jax.eval_shape(
        lambda: prepare_decoding_params(init_params(CONFIG), CONFIG, dtype=precision.compute_dtype)
    )
    cache = jax.eval_shape(lambda: init_cache(CONFIG, batch, 32, precision.activation_dtype))
    rows = [PromptState("", [1], 5, config=config)] * batch
    padding: Any = np.zeros(batch, np.int32)
    settings = make_decode_params(rows, padding, [5] * batch, 1)
    state = initial_state(np.ones((batch, 32), np.int32), settings.limits, 1)
    spec = DecoderSpec(CONFIG, precision, stages=stages)
    return decode.lower(Sampling(), spec, params, cache, state, settings, np.int32(9)).as_text()


def count(text: str, operation: str) -> int:
    """Count an operation in the text of a program."""
    return len(re.findall(rf"\bstablehlo\.{operation}\b", text))


@pytest.mark.parametrize(
    "settings",
    [{}, {"do_sample": False}, {"top_k": 50}, {"top_k": None, "top_p": 0.9}, {"repetition_penalty": 1.2}],
    ids=str,
)
def test_decode_for_a_gpu_has_no_conditional_and_no_loop_but_its_own(settings):
    config = GenerationConfig(**settings)
    stages = make_stages([config], has_bad_words=False, vocab_size=CONFIG.vocab_size)
    text = lowered(stages, config)
    assert not [name for name in ("case", "if", "sort") if count(text, name)]
    # XLA's own kernel takes up to 16 candidates
    assert all(int(k) <= 16 for k in re.findall(r"chlo\.top_k\(.*?k = (\d+)", text))
    # jax's random bits are a loop of five turns, once before the loop over tokens
    functions = [part for part in text.split("func.func ") if "threefry" not in part.split("(")[0]]
    assert sum(count(part, "while") for part in functions) == 1


def test_logits_for_a_gpu_are_not_rounded_to_16_bits():
    text = lowered(Stages(window=1), GenerationConfig(do_sample=False))
    # the head's product is the only one with the vocabulary in its result
    results = re.findall(r"stablehlo\.dot_general.*-> tensor<2x300x(\w+)>", text)
    assert results == ["f32"]


def test_layer_norms_of_one_row_for_a_gpu_have_two():
    """XLA would drop the axis of one row, and with it the fusion of a LayerNorm with the product behind it."""
    text = lowered(Stages(window=1), GenerationConfig(do_sample=False), batch=1)
    means = re.findall(r"stablehlo\.reduce\(.*applies stablehlo\.add .*tensor<(\d+)x1x16xf32>", text)
    assert means and set(means) == {"2"}


def test_decode_for_a_cpu_decides_while_it_runs():
    assert count(lowered(None, GenerationConfig()), "case") > 0


def test_greedy_decode_draws_no_random_numbers():
    text = lowered(Stages(window=1), GenerationConfig(do_sample=False))
    assert "threefry" not in text


def test_spec_without_sampling_is_that_of_any_setting():
    precision = decoding_precision("float32", device=Device.of_backend("cpu"))
    spec = DecoderSpec(CONFIG, precision, lambda logits, history: logits, Stages(window=64))
    assert spec.without_sampling == DecoderSpec(CONFIG, precision)
