"""Settings of generation beside the weights: which of them count, and what is said of them."""

from __future__ import annotations

import dataclasses
import json
import shutil
import types
import warnings
from typing import Any

import pytest
from tiny_models import CONFIG, random_model

from gpt2jax.cli import main
from gpt2jax.generation.config import GenerationConfig
from gpt2jax.generation.file_settings import find_file_settings
from gpt2jax.generation.generate import generate
from gpt2jax.generation.requests import make_request
from gpt2jax.language_model import LanguageModel
from gpt2jax.loading import load
from gpt2jax.utils.notices import Notice
from gpt2jax.weights.saved_settings import SavedSettings


def found(
    generation: dict[str, Any], config: dict[str, Any] | None = None, **given: Any
) -> tuple[dict[str, Any], str]:
    """Return the settings that count, and the notice of them."""
    saved = SavedSettings({} if config is None else config, generation)
    model: Any = types.SimpleNamespace(config=CONFIG, saved=saved)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        settings = find_file_settings(model, given)
    assert len(caught) <= 1 and all(one.category is Notice for one in caught)
    return settings, "".join(str(one.message) for one in caught)


PLAIN = {
    "_from_model_config": True,
    "bos_token_id": 299,
    "eos_token_id": 299,
    "transformers_version": "4.26.0",
}


@pytest.mark.parametrize(
    ("generation", "config"),
    [
        ({}, {}),
        # as the files of gpt2 on the hub are
        (PLAIN, {"task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}}),
        # old versions wrote their defaults into config.json
        ({}, {"do_sample": False, "max_length": 20, "top_k": 50, "num_beams": 1, "bad_words_ids": None}),
        ({"pad_token_id": 3, "use_cache": True, "output_scores": False, "temperature": None}, {"top_k": 7}),
    ],
)
def test_find_file_settings_of_plain_files_changes_nothing(generation, config):
    assert found(generation, config) == ({}, "")


@pytest.mark.parametrize(
    ("generation", "given", "settings"),
    [
        ({"temperature": 0.7, "top_k": 3, "top_p": 0.9, "do_sample": False}, {}, "all"),
        ({"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "typical_p": 0.5, "min_p": 0.1}, {}, "all"),
        ({"max_new_tokens": 9, "min_new_tokens": 2, "stop_strings": ("a",)}, {}, "all"),
        ({"min_length": 5, "max_length": 50, "num_return_sequences": 2}, {}, "all"),
        ({"num_beams": 3, "length_penalty": 0.5, "early_stopping": True}, {}, "all"),
        ({"penalty_alpha": 0.6, "top_k": 4}, {}, "all"),
        ({"top_k": 0}, {}, {"top_k": None}),
        (
            {"bad_words_ids": [[1, 2], [299, 300]], "suppress_tokens": [7, 300]},
            {},
            {"bad_words": ((1, 2), (7,))},
        ),
        # longer than the context
        ({"max_length": 2048}, {}, {"max_length": 128}),
        ({"max_length": 2048}, {"overflow": "sliding_window"}, {"max_length": 2048}),
        # settings of the call win, and over those that do not go with them
        ({"temperature": 0.7, "top_p": 0.9}, {"temperature": 1.0}, {"top_p": 0.9}),
        ({"max_length": 50, "top_p": 0.9}, {"max_new_tokens": 3}, {"top_p": 0.9}),
        ({"temperature": 0.7, "repetition_penalty": 1.3}, {"num_beams": 2}, {"repetition_penalty": 1.3}),
        ({"num_beams": 4, "length_penalty": 0.5}, {"temperature": 0.7}, {}),
        ({"num_beams": 4, "length_penalty": 0.5}, {"num_beams": 1}, {}),
        ({"length_penalty": 0.5}, {"num_beams": 2}, {"length_penalty": 0.5}),
        ({"num_beams": 4, "top_p": 0.9}, {"top_p": [0.5, 0.6]}, {}),
        # what transformers does with settings that do not go together
        ({"max_length": 50, "max_new_tokens": 3}, {}, {"max_new_tokens": 3}),
        ({"min_length": 50, "min_new_tokens": 3}, {}, {"min_new_tokens": 3}),
        ({"length_penalty": 0.5, "early_stopping": True}, {}, {}),
        ({"num_beams": 4, "temperature": 0.7, "top_k": 3}, {}, {"num_beams": 4}),
        ({"penalty_alpha": 0.6, "do_sample": True, "top_k": 4}, {}, {"do_sample": True, "top_k": 4}),
        ({"penalty_alpha": 0.6, "num_beams": 2}, {}, {"num_beams": 2}),
    ],
    ids=str,
)
def test_find_file_settings(generation, given, settings):
    expected = generation if settings == "all" else settings
    settings, _ = found(generation, **given)
    assert settings == expected
    GenerationConfig(**{**settings, **{name: value for name, value in given.items() if name != "top_p"}})


def test_find_file_settings_of_an_old_config():
    config = {"repetition_penalty": 1.2, "top_k": 50, "max_length": 20}
    for generation in ({}, PLAIN):
        settings, notice = found(generation, config)
        assert settings == {"repetition_penalty": 1.2}
        assert notice == (
            "config.json beside the weights sets repetition_penalty=1.2 (a setting of the call wins)"
        )


@pytest.mark.parametrize(
    ("generation", "given", "notice"),
    [
        (
            {"temperature": 0.7, "top_p": 1.0, "top_k": 3, "do_sample": True},
            {},
            "sets temperature=0.7, top_k=3 (a setting of the call wins)",
        ),
        ({"temperature": 0.7, "do_sample": True}, {"temperature": 1.0, "top_k": 9}, ""),
        ({"do_sample": True}, {}, "samples without top_k, which is 5 here and 50 in transformers"),
        (
            {"guidance_scale": 2.0, "num_beam_groups": 1, "forced_eos_token_id": 5},
            {},
            "asks for forced_eos_token_id, guidance_scale, which is not supported and has no effect",
        ),
        (
            {"max_time": 1, "forced_eos_token_id": 0, "diversity_penalty": 0.0},
            {},
            "asks for max_time, forced_eos_token_id, which is not supported and has no effect",
        ),
        (
            {"num_beams": 2, "do_sample": True, "top_k": 3},
            {},
            "sets num_beams=2 (a setting of the call wins); it asks for do_sample with num_beams, which is not "
            "supported and has no effect",
        ),
    ],
)
def test_find_file_settings_shows_what_changes(generation, given, notice):
    assert found(generation, **given)[1] == (notice and f"generation_config.json beside the weights {notice}")


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        (
            {"temperature": "hot"},
            "generation_config.json: temperature must be a number of at least 0, got 'hot'",
        ),
        ({"top_p": 1.5}, "top_p must be a number above 0 and at most 1, got 1.5"),
        ({"max_length": 0}, "max_length must be a positive whole number, or None, got 0"),
        ({"bad_words_ids": [5]}, "generation_config.json: bad_words_ids must be a list"),
    ],
)
def test_find_file_settings_names_file_and_field(generation, message):
    with pytest.raises(ValueError, match=message):
        found(generation)
    given = {name.removesuffix("_ids"): None for name in generation}
    assert found(generation, **given) == ({}, "")  # what does not count is not read


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    random_model(3).save(folder)
    settings = {
        "top_k": 2,
        "repetition_penalty": 1.5,
        "max_length": 9,
        "eos_token_id": 299,
        "pad_token_id": 4,
    }
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def model(folder) -> LanguageModel:
    return load(folder)


def test_load_says_that_a_setting_is_not_legal(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "bad")
    (tmp_path / "bad" / "generation_config.json").write_text(json.dumps({"temperature": -1}))
    with pytest.warns(
        Notice, match=r"temperature must be .*, got -1; to generate text, give this setting in the"
    ):
        model = load(tmp_path / "bad")
    assert find_file_settings(model, {"temperature": 1.0}) == {}


OURS: dict[str, Any] = {"top_k": 2, "repetition_penalty": 1.5, "max_length": 9}


@pytest.mark.slow
def test_generate_without_config_takes_the_settings_beside_the_weights(model):
    bare = dataclasses.replace(model, saved=None)
    with pytest.warns(
        Notice, match="generation_config.json beside the weights sets max_length=9, top_k=2, rep"
    ):
        outputs = generate(model, [[1, 2], [3]], seed=5)
    expected = generate(bare, [[1, 2], [3]], seed=5, **OURS)
    assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]
    assert all(output.file_settings == OURS for output in outputs) and expected[0].file_settings == {}


def test_make_request_takes_settings_of_the_call_first(model):
    request = make_request(model, [1, 2], None, {"max_new_tokens": 3})
    assert request.file_settings == {"top_k": 2, "repetition_penalty": 1.5}
    assert request.config == GenerationConfig(max_new_tokens=3, top_k=2, repetition_penalty=1.5)
    # as `beam_search` asks
    request = make_request(model, [1, 2], None, {"num_beams": 4}, is_search=True)
    assert request.config == GenerationConfig(num_beams=4, max_length=9, repetition_penalty=1.5)
    # a config counts alone
    request = make_request(model, [1, 2], GenerationConfig(), {"max_new_tokens": 3})
    assert request.config == GenerationConfig(max_new_tokens=3) and request.file_settings == {}


@pytest.mark.slow
def test_generate_command_takes_the_settings_beside_the_weights(folder, model, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        main(["generate", "a", "", "--model", str(folder), "--seed", "5"])
    said = capsys.readouterr()
    first, second = (generate(model, prompt, seed=5 + i)[0] for i, prompt in enumerate(("a", "")))
    assert said.out == f"--- prompt 1 of 2 ---\n{first}\n\n--- prompt 2 of 2 ---\n{second}\n"
    line = said.err.splitlines()[0]
    assert line == (
        "gpt2jax generate: note: generation_config.json beside the weights sets max_length=9, top_k=2, "
        "repetition_penalty=1.5 (a setting of the call wins)"
    )
    # an option wins also with its default
    options = ["--top-k=5", "--repetition_penalty", "1", "--max-new-tokens", "64", "--out", "-"]
    main(["generate", "a", "--model", str(folder), "--seed", "5", *options])
    said = json.loads(capsys.readouterr().out)
    assert (
        said["file_settings"] == {}
        and said["text"] == generate(model, "a", GenerationConfig(), seed=5)[0].text
    )


def test_generation_settings_survive_load_and_save(folder, model, tmp_path):
    model.save(tmp_path / "again")
    assert load(tmp_path / "again").saved.generation == {  # pyright: ignore[reportOptionalMemberAccess]
        **json.loads((folder / "generation_config.json").read_text()),
        "bos_token_id": 299,
    }


@pytest.mark.slow
def test_min_length_counts_the_prompt():
    model = random_model(3)
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 9}
    [free] = generate(model, [1, 2], stop_token_ids=[], **settings)
    stop = free.token_ids[1]
    lengths = {
        least: len(generate(model, [1, 2], stop_token_ids=[stop], min_length=least, **settings)[0].token_ids)
        for least in (0, 3, 6)
    }
    assert lengths[0] <= 1 and lengths[3] <= 1 and lengths[6] >= 4
    short, long = generate(model, [[1, 2], [1, 2, 3, 4]], stop_token_ids=[stop], min_length=6, **settings)
    assert (
        short.token_ids
        == generate(model, [1, 2], stop_token_ids=[stop], min_new_tokens=4, **settings)[0].token_ids
    )
    assert (
        long.token_ids
        == generate(model, [1, 2, 3, 4], stop_token_ids=[stop], min_new_tokens=2, **settings)[0].token_ids
    )
