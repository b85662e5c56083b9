"""`Generator`: prepares weights once, frees them, and keeps no model alive."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import jax
import pytest
from tiny_models import encode, random_model

from gpt2jax.generation import generate as generate_module
from gpt2jax.generation import generator as generator_module
from gpt2jax.generation.config import GenerationConfig
from gpt2jax.generation.generate import beam_search, generate, stream
from gpt2jax.generation.generator import Generator

CONFIG = GenerationConfig(max_new_tokens=3, do_sample=False)


@pytest.fixture
def prepared(monkeypatch):
    """The models whose weights have been prepared, in order."""
    models = []

    def prepare(model, dtype):
        models.append(model)
        return prepare_model(model, dtype)

    prepare_model = generator_module.prepare_model
    monkeypatch.setattr(generator_module, "prepare_model", prepare)
    return models


@pytest.mark.slow
def test_generator_prepares_its_weights_and_its_drafts_once(prepared):
    model, draft = random_model(0), random_model(1)
    with Generator(model) as generator:
        outputs = [generator.generate("a", CONFIG), generator.generate("a", CONFIG, draft_model=draft)]
        text = "".join(generator.stream("a", CONFIG, draft_model=draft))
        generator.beam_search("a", max_new_tokens=3)
    assert [model is known for model, known in zip(prepared, [model, draft], strict=True)] == [True, True]
    assert outputs[0][0].text == outputs[1][0].text == text
    with pytest.raises(ValueError, match="generator is closed"):
        generator.generate("a", CONFIG)


@pytest.mark.slow
def test_generator_frees_its_weights_when_closed():
    model = random_model(0)
    generator = Generator(model)
    generator.generate("a", CONFIG)
    kernel = weakref.ref(generator._prepared()["h"][0]["mlp"]["c_fc"]["kernel"].values)
    generator.close()
    gc.collect()
    assert kernel() is None


@pytest.mark.slow
def test_generate_keeps_the_weights_of_the_last_model(prepared):
    model, other = random_model(0), random_model(1)
    for asked in (model, model, other, other, model):
        generate(asked, "a", CONFIG)
    beam_search(model, "a", max_new_tokens=3)
    list(stream(model, "a", CONFIG))
    assert [asked is model for asked in prepared] == [True, False, True]
    generate(model, "a", CONFIG, dtype="bfloat16")
    generate(dataclasses.replace(model, tokenizer=None), encode(model, "a"), CONFIG)
    assert len(prepared) == 5


def test_generate_notices_parameters_that_were_replaced(prepared):
    model = random_model(0)
    before = generate(model, "a", CONFIG)
    model.params["ln_f"]["bias"] = model.params["ln_f"]["bias"] + 5.0
    after = generate(model, "a", CONFIG)
    assert len(prepared) == 2 and before[0].logprobs != after[0].logprobs


def test_generate_keeps_no_model_alive():
    model = random_model(0)
    generate(model, "a", CONFIG)
    cache = generate_module._last_weights.model
    kernel = weakref.ref(cache.get(model, jax.numpy.dtype("float32"))["h"][0]["mlp"]["c_fc"]["kernel"].values)
    known = weakref.ref(model)
    assert kernel() is not None
    del model
    gc.collect()
    assert known() is None and kernel() is None


@pytest.mark.slow
def test_generator_takes_a_config_for_each_row():
    model = random_model(0)
    configs = [GenerationConfig(max_new_tokens=n, temperature=n / 2) for n in (2, 4)]
    together = generate(model, ["a", "b"], configs, seed=5, stop_token_ids=[])
    for i, config in enumerate(configs):
        [alone] = generate(model, "ab"[i], config, seed=5 + i, stop_token_ids=[])
        assert together[i].token_ids == alone.token_ids and len(alone.token_ids) == (2, 4)[i]


@pytest.mark.slow
def test_generate_with_beams_is_beam_search():
    model = random_model(0)
    beams = beam_search(model, ["a", "b"], num_beams=3, num_return_sequences=2, max_new_tokens=4)
    outputs = generate(model, ["a", "b"], num_beams=3, num_return_sequences=2, max_new_tokens=4)
    assert outputs == [beam for row in beams for beam in row] and len(outputs) == 4
    with pytest.raises(ValueError, match="num_beams must be 1 for a stream, got 3; use generate"):
        stream(model, "a", num_beams=3)
