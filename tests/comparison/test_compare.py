from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import jax
import numpy as np
import pytest
from comparisons import LENGTH, NASTY, PROMPTS, SETTINGS, TEXTS, TRAINING_TEXTS, make_comparison
from tiny_models import CONFIG, decode_bytes, encode, random_model

from gpt2jax.comparison.compare import DEFAULT_PROMPTS, compare
from gpt2jax.evaluation.config import EvaluationConfig
from gpt2jax.evaluation.evaluate import evaluate
from gpt2jax.generation.config import GenerationConfig
from gpt2jax.generation.generate import generate
from gpt2jax.report.plots import comparison_plots
from gpt2jax.report.tables import figures_table, paired_table
from gpt2jax.utils.fingerprint import params_fingerprint
from gpt2jax.utils.notices import Notice


@pytest.mark.slow
def test_compare_evaluations_are_those_of_evaluate(comparison, model):
    alone = evaluate(model, TEXTS, sequence_length=LENGTH, batch_size=8)
    found = comparison["generic"].evaluation.per_document
    np.testing.assert_array_equal(alone.per_document.loss, found.loss)
    assert comparison.baseline.name == "generic" and comparison.baseline.versus_baseline is None


@pytest.mark.slow
def test_comparison_as_dict_is_as_promised(comparison):
    data = json.loads(comparison.as_json())
    assert data["schema"] == "gpt2jax.comparison" and data["schema_version"] == 2
    assert [entry["name"] for entry in data["models"]] == ["generic", NASTY, "flat"]
    figures = {"loss", "accuracy", "keras_loss", "keras_accuracy", "perplexity", "bits_per_byte", "tokens"}
    for entry in data["models"]:
        assert figures <= entry.keys()
        evaluation = comparison[entry["name"]].evaluation
        assert all(entry[name] == getattr(evaluation, name) for name in figures)
        assert {**entry, **evaluation.as_dict()} == entry
    assert set(data["paired"]) == {NASTY, "flat"}
    assert set(data["breakdown"]) == set(data["paired"])
    assert [(pair["baseline"], pair["model"]) for pair in data["pairs"]] == [
        ("generic", NASTY),
        ("generic", "flat"),
        (NASTY, "flat"),
    ]
    assert set(data["repetition"]) == {model.name for model in comparison.models}
    for name, breakdown in data["breakdown"].items():
        whole = data["paired"][name]["difference"] * data["models"][0]["tokens"]
        for kind in ("frequency", "kind"):
            parts = [entry["difference"] * entry["tokens"] for entry in breakdown[kind]]
            assert sum(parts) == pytest.approx(whole) and sum(
                e["fraction"] for e in breakdown[kind]
            ) == pytest.approx(1)
        improved = comparison[name].versus_baseline.excerpts.improved
        assert [e["document"] for e in breakdown["improved"][:3]] == [e.document for e in improved]
    assert data["overlap"]["exact"] == 1 and data["overlap"]["listed"][0]["document"] == 2
    assert len(data["generations"]) == 3 * len(PROMPTS)
    for entry in data["generations"]:
        assert {"model", "prompt", "text", "seconds", "tokens_per_second"} <= entry.keys()
        assert entry["seconds"] >= 0 and entry["tokens_per_second"] > 0 and 0 <= entry["tokens"] <= 12


def test_comparison_pairs_are_of_any_two_models(comparison):
    assert comparison.pairs["generic", "flat"] is comparison.differences["flat"]
    found = comparison.pairs[NASTY, "flat"]
    expected = comparison["flat"].evaluation.loss - comparison[NASTY].evaluation.loss
    assert found.baseline == NASTY and found.difference == pytest.approx(expected)
    assert found.interval[0] < found.difference < found.interval[1]
    assert [row[0] for row in paired_table(comparison).rows] == [
        f"{second} − {first}" for first, second in (("generic", NASTY), ("generic", "flat"), (NASTY, "flat"))
    ]


@pytest.mark.slow
def test_compare_on_several_texts_is_a_comparison_on_each(comparison, model, other_model, tmp_path):
    models, held_out = {"generic": model, NASTY: other_model}, {"first": TEXTS, "second": TEXTS[4:]}
    training: Any = iter(TRAINING_TEXTS)  # which can be read only once
    origins = {"first": {"split": "validation"}, "second": {"split": "test"}}
    found = compare(models, held_out, PROMPTS, **SETTINGS, seed=7, training_texts=training, source=origins)
    first, second = found.parts
    assert found.by_texts == {"first": first, "second": second} and found.models is first.models
    assert [part.texts_name for part in found.parts] == ["first", "second"]
    alone, content = compare(models, TEXTS[4:], [], **SETTINGS, seed=7), found.as_dict()
    assert second.as_dict()["paired"] == alone.as_dict()["paired"] == content["by_texts"]["second"]["paired"]
    assert first.as_dict()["paired"][NASTY] == comparison.as_dict()["paired"][NASTY]
    assert content["by_texts"]["second"]["data"] == {"name": "second", **alone.data, "split": "test"}
    assert first.overlap == comparison.overlap and second.overlap != first.overlap
    assert [len(entries) for entries in (content["generations"], found[NASTY].generations)] == [10, 5]
    assert found.to_frame().loc[("second", NASTY), "loss"] == second[NASTY].evaluation.loss
    found.save(tmp_path)
    for name in ("report.html", "report.md"):
        text = (tmp_path / name).read_text().replace("\xa0", " ")
        for part in found.parts:
            assert paired_table(part).rows[0][1] in text
            assert f"same documents ({part.texts_name})" in text.replace("\\", "")


def without_times(value):
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in ("seconds", "tokens_per_second")}
    return [without_times(item) for item in value] if isinstance(value, list) else value


@pytest.mark.slow
def test_compare_again_gives_the_same_to_the_last_digit(comparison, model, other_model):
    again = make_comparison(model, other_model)
    assert json.dumps(without_times(again.as_dict())) == json.dumps(without_times(comparison.as_dict()))
    pictures = [[plot.svg for plot in comparison_plots(found)] for found in (again, comparison)]
    assert pictures[0] == pictures[1] and len(pictures[0]) == 7


def test_compare_with_another_seed(comparison, model, other_model):
    other = compare({"generic": model, NASTY: other_model}, TEXTS, PROMPTS, **SETTINGS, seed=8)
    assert other.baseline.generations[0]["text"] != comparison.baseline.generations[0]["text"]
    assert other.differences[NASTY].interval != comparison.differences[NASTY].interval
    assert other.differences[NASTY].difference == comparison.differences[NASTY].difference


def test_compare_generations(comparison, model):
    first = comparison.baseline.generations
    assert [entry["prompt"] for entry in first] == PROMPTS and {entry["model"] for entry in first} == {
        "generic"
    }
    alone = generate(model, ["the"], max_new_tokens=12, top_k=5, seed=7)[0]
    assert first[0]["text"] == alone.text
    assert first[1]["text"] != first[3]["text"]  # the same prompt, with another seed
    assert all(found.first_call_seconds > 0 for found in comparison.models)


@pytest.mark.slow
def test_compare_takes_configs_and_overrides(model):
    settings: dict[str, Any] = {"do_sample": False, "repetition_penalty": 1.5}
    generation = GenerationConfig(max_new_tokens=12, **settings)
    evaluation = EvaluationConfig(sequence_length=LENGTH, batch_size=8)
    found = compare({"a": model}, TEXTS, ["the"], evaluation, generation, resamples=10)
    again = compare({"a": model}, TEXTS, ["the"], **{**SETTINGS, "resamples": 10}, **settings)
    assert found.baseline.evaluation.config == again.baseline.evaluation.config
    assert found.settings == again.settings and found.settings["repetition_penalty"] == 1.5
    [expected] = generate(model, ["the"], generation)
    assert found.baseline.generations[0]["text"] == again.baseline.generations[0]["text"] == expected.text


def test_compare_model_with_itself(model):
    found = compare({"a": model, "b": model}, TEXTS, [], **SETTINGS).differences["b"]
    assert (
        found.difference == 0
        and found.standard_error == 0
        and found.interval == (0, 0)
        and found.win_rate == 0.5
    )


@pytest.mark.slow
def test_compare_single_document_has_no_standard_error(model, other_model, tmp_path):
    with pytest.warns(Notice, match="interval of the difference comes from 1 document and is too narrow"):
        found = compare({"a": model, "b": other_model}, ["one text only"], [], **SETTINGS)
    assert found.differences["b"].standard_error is None
    data = json.loads((found.save(tmp_path) / "comparison.json").read_text())
    assert data["models"][0]["loss_standard_error"] is None
    assert (
        "Caution: the interval of the difference comes from 1 document"
        in (tmp_path / "report.md").read_text()
    )


def test_paired_difference_of_ten_documents_has_no_warning(comparison):
    found = comparison.differences[NASTY]
    assert found.documents == len(TEXTS) and found.as_dict()["warning"] is None
    assert dataclasses.replace(found, documents=10).warning is None
    assert "comes from 9 documents" in str(dataclasses.replace(found, documents=9).warning)


def test_compare_one_model(model, tmp_path):
    found = compare({"only": model}, TEXTS, ["the"], **SETTINGS)
    assert found.differences == {} and found.as_dict()["paired"] == {}
    found.save(tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "only: " in text and "Where the loss lies" in text and "Where the difference lies" not in text


@pytest.mark.slow
def test_compare_different_tokenizers_per_byte(model):
    larger = random_model(2, dataclasses.replace(CONFIG, vocab_size=350, bos_token_id=None, eos_token_id=349))
    models = {"a": model, "b": larger}
    with pytest.raises(
        ValueError, match="windows must be 'non_overlapping', .* different tokenizers, got 'truncate'"
    ):
        compare(models, TEXTS, [], **SETTINGS)
    found = compare(models, TEXTS, [], windows="non_overlapping", **SETTINGS)
    a, b = (result.evaluation for result in found.models)
    assert a.tokens != b.tokens and a.as_dict()["bytes"] == b.as_dict()["bytes"]
    paired, versus = found.differences["b"], found["b"].versus_baseline
    assert paired.unit == "nats per byte" and paired.accuracy_difference is None
    assert versus is not None and versus.excerpts is versus.breakdown is None
    assert "Keras loss" not in figures_table(found).columns
    assert a.bits_per_byte is not None and b.bits_per_byte is not None
    assert paired.difference == pytest.approx((b.bits_per_byte - a.bits_per_byte) * np.log(2))


def test_excerpts_show_the_texts_by_difference(comparison, model):
    excerpts = comparison[NASTY].versus_baseline.excerpts
    first, second = (comparison[name].evaluation.per_document for name in ("generic", NASTY))
    means = (second.loss - first.loss) / first.tokens
    improved = [excerpt.difference for excerpt in excerpts.improved]
    assert improved == sorted(improved) and all(difference < 0 for difference in improved)
    assert all(excerpt.difference > 0 for excerpt in excerpts.regressed)
    for excerpt in excerpts.improved + excerpts.regressed:
        assert excerpt.difference == pytest.approx(means[excerpt.document])
        assert sum(difference for _, difference in excerpt.pieces) / excerpt.tokens == pytest.approx(
            excerpt.difference
        )
        shown = "".join(text for text, _ in excerpt.pieces).rstrip("■")
        ids = encode(model, TEXTS[excerpt.document])[: LENGTH - 1]
        assert shown == decode_bytes(model, ids).decode(errors="replace")


@pytest.mark.slow
def test_compare_model_without_finite_loss(model, tmp_path):
    broken = dataclasses.replace(model, params=jax.tree.map(lambda x: x * np.nan, model.params))
    with pytest.warns(Notice, match="^broken: 16 of 16 documents have no finite loss: 0, 1, 2, "):
        found = compare({"good": model, "broken": broken}, TEXTS, PROMPTS, **SETTINGS)
    data = json.loads((found.save(tmp_path) / "comparison.json").read_text())
    assert data["models"][1]["loss"] is None and data["paired"]["broken"]["difference"] is None
    assert "no finite loss" in (tmp_path / "report.md").read_text()


def test_default_prompts_are_of_every_kind():
    assert len(DEFAULT_PROMPTS) == 8 and DEFAULT_PROMPTS[-2:] == ("", "")
    assert sum(prompt.endswith("?") for prompt in DEFAULT_PROMPTS) == 5


def test_compare_without_a_tokenizer(model):
    bare = dataclasses.replace(model, tokenizer=None)
    found = compare({"a": bare}, [[1, 2, 3], [4, 5]], **SETTINGS)
    assert found.baseline.generations == [] and found.baseline.repetition is None
    found = compare({"a": bare}, [[1, 2, 3], [4, 5]], [[1, 2]], **SETTINGS)
    [generation] = found.baseline.generations
    assert generation["prompt"] == [1, 2] and generation["tokens"] > 0


@pytest.mark.slow
def test_compare_takes_numpy_numbers(model):
    settings = {"seed": np.uint32(2**32 - 1), "resamples": np.int64(20), "max_new_tokens": np.int16(2)}
    settings |= {"top_k": np.int64(3), "temperature": np.float32(0.5), "sequence_length": np.int32(LENGTH)}
    found = compare({"a": model}, TEXTS, "a prompt by itself", **settings)  # pyright: ignore[reportArgumentType]
    assert json.loads(found.as_json())["settings"]["seed"] == 2**32 - 1
    assert [generation["prompt"] for generation in found.baseline.generations] == ["a prompt by itself"]
    two = compare({"a": model}, TEXTS, ["x", "y"], **settings)  # pyright: ignore[reportArgumentType]
    assert [generation["seed"] for generation in two.baseline.generations] == [2**32 - 1, 0]


def test_params_fingerprint_tells_models_apart(model, other_model):
    assert params_fingerprint(model.params) == params_fingerprint(jax.tree.map(np.asarray, model.params))
    assert params_fingerprint(model.params) != params_fingerprint(other_model.params)


@pytest.mark.parametrize(
    ("models", "settings", "error", "message"),
    [
        ({}, {}, ValueError, "models must be a dict of at least one name and model, got {}"),
        ({"": None}, {}, ValueError, "name of a model must be a text that is not empty, got ''"),
        ({"a": "gpt2"}, {}, ValueError, r"models\['a'\] must be a LanguageModel, got 'gpt2'; gpt2jax.load"),
        (None, {"texts": []}, ValueError, "the data set is empty"),
        (None, {"texts": ["", "a"]}, ValueError, "shorter than two tokens"),
        (None, {"texts": "one"}, TypeError, "one string"),
        (None, {"sequence_length": 129}, ValueError, "at most the model's context of 128 tokens, got 129"),
        (None, {"resamples": 0}, ValueError, "resamples must be a positive whole number, got 0"),
        (None, {"max_length": 20}, ValueError, "max_length=20 does not go with max_new_tokens"),
        (
            None,
            {"num_return_sequences": 2},
            ValueError,
            "num_return_sequences must be 1, got 2; repeat a prompt",
        ),
        (None, {"evaluation": 5}, ValueError, "evaluation must be an EvaluationConfig, or None, got 5"),
        (None, {"generation": 5}, ValueError, "generation must be a GenerationConfig, or None, got 5"),
        (None, {"prompts": ["long " * 60]}, ValueError, "prompt 0 has .* tokens"),
        (None, {"prompts": 5}, ValueError, "prompts must be .*, got 5"),
        (
            None,
            {"temperature": [1.0]},
            ValueError,
            r"temperature must be a number of at least 0, got \[1.0\]",
        ),
        (None, {"top_p": 7}, ValueError, "top_p must be .*, got 7"),
        (
            None,
            {"max_new_tokens": 0},
            ValueError,
            "max_new_tokens must be a positive whole number, or None, got 0",
        ),
        (None, {"seed": 1.5}, ValueError, "seed must be a whole number.*, got 1.5"),
        (None, {"seed": 2**32}, ValueError, "seed must be a whole number.*, got 4294967296"),
        (None, {"prompts": {"a": 1}}, ValueError, "prompts must be .*, got {'a': 1}"),
        (
            None,
            {"prompts": {"a"}},
            ValueError,
            "prompts must be .*, got {'a'}",
        ),  # in another order each time
        (None, {"texts": {}}, ValueError, "texts must be a list of texts, or a dict of such lists by name"),
        (None, {"texts": {"a": "one"}}, TypeError, r"texts\['a'\] must be a list of texts, got one string"),
        (
            None,
            {"texts": {"a": TEXTS}, "source": {"split": "test"}},
            ValueError,
            "source must be a dict for each of a, got",
        ),
        (None, {"texts": {"a text"}}, TypeError, "texts must be a list of texts, got {'a text'}"),
        (None, {"source": "docs"}, ValueError, "source must be a dict, or None, got 'docs'"),
        (
            None,
            {"training_texts": "one"},
            TypeError,
            "training_texts must be a list of texts, got one string",
        ),
        (None, {"resample": 3}, TypeError, "there is no setting 'resample'; did you mean 'resamples'"),
        (None, {"window": "rolling"}, TypeError, "did you mean 'windows'"),
    ],
)
def test_compare_refuses(model, models, settings, error, message):
    texts, prompts = settings.pop("texts", TEXTS), settings.pop("prompts", [])
    with pytest.raises(error, match=message):
        compare({"a": model} if models is None else models, texts, prompts, **{**SETTINGS, **settings})


def test_compare_finds_an_impossible_prompt_before_the_long_work(model, monkeypatch):
    monkeypatch.setattr(
        sys.modules["gpt2jax.comparison.compare"], "evaluate", lambda *_, **__: pytest.fail("evaluated first")
    )
    with pytest.raises(ValueError, match="prompt 1 .*: shorten the prompt below 128 tokens$"):
        compare({"a": model}, TEXTS, ["a", "long " * 60], **SETTINGS)
