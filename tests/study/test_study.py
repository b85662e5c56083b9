"""The study: its figures against direct evaluation, and its resumption."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
from tiny_models import TINY, random_model, uniform_model

from gpt2jax.cli import main
from gpt2jax.cli.finetune import AdapterOptions
from gpt2jax.cli.study import Options, default_output, study_config
from gpt2jax.evaluation.config import EvaluationConfig
from gpt2jax.evaluation.evaluate import evaluate
from gpt2jax.evaluation.keras_metrics import keras_metrics
from gpt2jax.generation.config import GenerationConfig
from gpt2jax.loading import load
from gpt2jax.lora.config import LoRAConfig
from gpt2jax.studies import compared, stages
from gpt2jax.studies import study as study_module
from gpt2jax.studies.config import StudyConfig
from gpt2jax.studies.stages import split_in_parts
from gpt2jax.studies.study import study
from gpt2jax.studies.tables import gains_table, published_table, split_table
from gpt2jax.tokenizer.bpe import Tokenizer
from gpt2jax.train.config import FinetuneConfig
from gpt2jax.utils.json_files import read_json

MODEL_CONFIG = dataclasses.replace(TINY, vocab_size=300)
TEXTS = {
    split: [f"{split} text number {i} of the set, " + "and more " * (i % 4) for i in range(count)]
    for split, count in (("train", 13), ("validation", 5), ("test", 6))
}
CONFIG = StudyConfig(
    training=FinetuneConfig(epochs=2, batch_size=4, packing="padded"),
    generation=GenerationConfig(max_length=12),
    prompts=("the", "", ""),
)


def tiny_model():
    return random_model(0, MODEL_CONFIG, Tokenizer.gpt2(300))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study that was never stopped."""
    return study(tiny_model(), TEXTS, CONFIG, output=tmp_path_factory.mktemp("study") / "out", progress=False)


def without_times(results):
    """The results without what differs from run to run."""
    if isinstance(results, dict):
        times = ("seconds", "first_call_seconds", "tokens_per_second", "timing", "command")
        return {name: without_times(value) for name, value in results.items() if name not in times}
    return [without_times(value) for value in results] if isinstance(results, list) else results


def stopping(function, call_to_stop):
    """The function, interrupted at one of its calls."""
    calls = itertools.count(1)

    def call(*args, **kwargs):
        if next(calls) == call_to_stop:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return call


@pytest.mark.slow
def test_study_figures_equal_those_of_evaluate_and_keras_metrics(finished):
    assert [result["name"] for result in finished.results] == ["generic", "stage 1", "stage 2"]
    for result in finished.results:
        is_generic = result["name"] == "generic"
        model = tiny_model() if is_generic else load(finished.output / result["folder"])
        for split in ("validation", "test"):
            direct = evaluate(model, TEXTS[split], EvaluationConfig(32))
            keras = keras_metrics(model, TEXTS[split], sequence_length=32)
            figures = result[split]
            assert (figures["loss"], figures["accuracy"]) == (direct.loss, direct.accuracy)
            assert (figures["keras_correct"], figures["keras_positions"]) == (keras.correct, keras.positions)
            assert figures["keras_loss"] == keras.loss
            assert figures["documents"] == len(TEXTS[split])
    assert len({result["validation"]["loss"] for result in finished.results}) == 3


@pytest.mark.slow
def test_study_trains_each_stage_on_its_part_from_the_last_weights(finished):
    runs = [read_json(finished.output / name / "run.json") for name in ("02-stage-1", "03-stage-2")]
    assert [run["data"]["documents"] for run in runs] == [6, 7]
    assert runs[1]["base_model"].endswith("02-stage-1")
    assert [result["training"] and result["training"]["steps"] for result in finished.results] == [None, 3, 4]


@pytest.mark.slow
def test_study_report_shows_published_figures_beside_own(finished):
    own = finished.results[2]
    assert published_table(finished.results).rows[-1][1:] == tuple(
        f"{own[split][name]:.4f}"
        for split in ("validation", "test")
        for name in ("keras_loss", "keras_accuracy")
    )
    row = split_table(finished.results, "test").rows[2]
    assert row[1] == f"{own['test']['keras_loss']:.6f}"
    assert row[4] == f"{own['test']['loss']:.4f} ± {own['test']['loss_standard_error']:.4f}"
    for name in ("report.html", "report.md"):
        report = (finished.output / name).read_text("utf-8")
        assert "3.9689" in report and "0.4631" in report and f"{own['test']['keras_loss']:.6f}" in report
    assert len(own["generations"]) == 3
    comparison = read_json(finished.output / "comparison.json")
    assert [model["loss"] for model in comparison["models"]] == [r["test"]["loss"] for r in finished.results]


@pytest.mark.slow
def test_study_stopped_anywhere_and_resumed_gives_identical_results(finished, tmp_path, monkeypatch):
    def run(config=CONFIG, *, resume=True):
        return study(tiny_model(), TEXTS, config, output=tmp_path, resume=resume, progress=False)

    # after the first evaluation; after the training of stage 1; between the stages; before the texts of stage 2; while
    # the stages are compared; before the report
    stops = (
        (stages, "evaluate", 2),
        (stages, "evaluate", 3),
        (stages, "finetune", 2),
        (stages, "generate_texts", 1),
        (compared, "make_excerpts", 2),
        (study_module, "save_report", 1),
    )
    for module, name, call_to_stop in stops:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, stopping(getattr(module, name), call_to_stop))
            with pytest.raises(KeyboardInterrupt):
                run()
        assert "results" not in read_json(tmp_path / "study.json")
    with pytest.raises(FileExistsError, match="holds a study"):
        run(resume=False)
    with pytest.raises(ValueError, match="cannot resume .*: stages was 2, is 1; choose another folder"):
        run(dataclasses.replace(CONFIG, stages=1))
    for name in ("finetune", "evaluate", "generate_texts"):  # all stages are finished
        monkeypatch.setattr(stages, name, None)
    monkeypatch.setattr(compared, "text_overlap", None)
    resumed = run()
    assert without_times(resumed.results) == without_times(finished.results)
    assert resumed.gains[0]["gain"] == finished.gains[0]["gain"]
    comparisons = [read_json(place / "comparison.json") for place in (finished.output, tmp_path)]
    assert comparisons[0]["paired"] == comparisons[1]["paired"]
    assert comparisons[0]["overlap"] == comparisons[1]["overlap"]
    assert not [*tmp_path.rglob("*.npz"), *tmp_path.glob("overlap.json")]
    monkeypatch.setattr(study_module, "compare_stages", None)  # a finished study computes nothing
    assert run() == resumed


@pytest.mark.slow
@pytest.mark.thorough
def test_study_of_two_models_and_both_methods_shows_gains_against_costs(finished, tmp_path):
    loaded = []

    def load_second():
        loaded.append("second")
        return random_model(1, MODEL_CONFIG, Tokenizer.gpt2(300))

    training = dataclasses.replace(CONFIG.training, steps=2, lora=LoRAConfig(rank=2))
    config = StudyConfig(1, training, ("full", "lora"), prompts=())
    found = study(
        {"first": tiny_model(), "a/second": load_second}, TEXTS, config, output=tmp_path, progress=False
    )
    names = ["generic", "full stage 1", "lora stage 1"]
    assert [result["name"] for result in found.results] == [
        f"{model} {name}" for model in ("first", "a/second") for name in names
    ]
    assert [result["folder"] for result in found.results[3:]] == [
        "a-second/01-generic",
        "a-second/02-full-stage-1",
        "a-second/03-lora-stage-1",
    ]
    assert len(loaded) == 5  # for the check, the evaluation, two trainings and the excerpts
    assert found.results[0]["test"]["loss"] == finished.results[0]["test"]["loss"]
    for gain, result in zip(found.gains, (found.results[i] for i in (1, 2, 4, 5)), strict=True):
        generic = found.results[0 if result["model"] == "first" else 3]
        assert gain["gain"] == pytest.approx(generic["test"]["loss"] - result["test"]["loss"], abs=1e-12)
        assert gain["interval"][0] <= gain["gain"] <= gain["interval"][1]
        assert gain["trained_parameters"] == result["training"]["trained_parameters"]
        assert gain["planned_bytes"] > 4 * gain["trained_parameters"]
    assert found.gains[1]["trained_parameters"] < found.gains[0]["trained_parameters"]
    assert [gain["name"] for gain in found.gains] == [
        "first full",
        "first lora",
        "a/second full",
        "a/second lora",
    ]
    report = (tmp_path / "report.html").read_text("utf-8").replace("\xa0", " ")
    for row in gains_table(found.gains).rows:
        assert all(cell in report for cell in row)
    assert "Gain against trained parameters" in report and "Gain against memory" in report


@pytest.mark.slow
def test_study_with_lora_trains_new_adapters_on_the_merged_weights(finished, tmp_path):
    training = dataclasses.replace(CONFIG.training, steps=1, lora=LoRAConfig(rank=2))
    config = StudyConfig(training=training, prompts=())
    found = study(tiny_model(), TEXTS, config, output=tmp_path, progress=False).results
    assert found[0]["test"]["loss"] == finished.results[0]["test"]["loss"]
    for result in found[1:]:
        # rank 2 at the four kernels of two layers: [32, 96], [32, 32], [32, 128] and [128, 32]
        assert result["training"]["trained_parameters"] == 2 * 2 * (128 + 64 + 160 + 160)
        model = load(tmp_path / result["folder"])
        assert evaluate(model, TEXTS["test"], EvaluationConfig(32)).loss == result["test"]["loss"]
    assert found[2]["test"]["loss"] < found[1]["test"]["loss"] < found[0]["test"]["loss"]


def test_split_in_parts_keeps_order_and_every_text():
    parts = split_in_parts(list(range(11)), 3)
    assert [len(part) for part in parts] == [3, 4, 4]
    assert [item for part in parts for item in part] == list(range(11))


@pytest.mark.slow
def test_study_rejects_more_stages_than_texts(tmp_path):
    with pytest.raises(ValueError, match="stages must be at most the 13 training texts, got 14"):
        study(tiny_model(), TEXTS, StudyConfig(14), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_study_rejects_models_with_other_tokens(tmp_path):
    models = {"a": tiny_model(), "b": uniform_model(dataclasses.replace(MODEL_CONFIG, vocab_size=301))}
    with pytest.raises(ValueError, match="must have the same tokens, but those of b are others"):
        study(models, TEXTS, CONFIG, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("names", [("a b", "a/b"), ("..", "b")], ids=["same folder", "no folder"])
def test_study_rejects_names_that_make_no_folders(names, tmp_path):
    with pytest.raises(ValueError, match="name"):
        study(dict.fromkeys(names, tiny_model()), TEXTS, CONFIG, output=tmp_path / "out")


@pytest.mark.parametrize(
    ("methods", "legal"),
    [(("full", "full"), "different ones"), (("full",), "with 'lora'"), (("half",), "full, lora")],
    ids=["twice", "without lora", "unknown"],
)
def test_study_config_rejects_methods(methods, legal):
    with pytest.raises(ValueError, match=f"methods must be .*{legal}"):
        StudyConfig(training=FinetuneConfig(lora=LoRAConfig()), methods=methods)


def test_study_config_rejects_windows_without_keras_figures():
    with pytest.raises(ValueError, match="windows must be 'truncate' in a study, got 'sliding'"):
        StudyConfig(evaluation=EvaluationConfig(windows="sliding"))


def test_study_config_of_the_command_has_both_methods():
    options = Options(
        ("gpt2", "m=gpt2-medium"), methods=("full", "lora"), lora_settings=AdapterOptions(rank=4)
    )
    config = study_config(options)
    lora = config.training_of("lora").lora
    assert config.training_of("full").lora is None and lora is not None and lora.rank == 4
    assert default_output(options).name == "study-gpt2-m-numeric-docs"


def test_study_command_explains_itself(capsys):
    with pytest.raises(SystemExit) as end:
        main(["study", "--help"])
    assert end.value.code == 0
    assert "--stages" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "0"], "--stages must be a positive whole number, got 0"),
        (["--model", "a", "a"], "names of models must be unique, got 'a' twice; write NAME=MODEL"),
        (
            ["--methods", "full", "--lora"],
            "--methods must be with 'lora' if adapters have settings, got ('full',)",
        ),
        (
            ["--out", "here"],
            "--out here holds a study; --resume it, --overwrite it, or choose another folder",
        ),
    ],
    ids=["stages", "model", "methods", "out"],
)
def test_study_command_says_what_is_wrong(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "study.json").write_text(json.dumps({}))
    with pytest.raises(SystemExit) as end:
        main(["study", *arguments])
    assert end.value.code == 2
    assert capsys.readouterr().err == f"gpt2jax study: error: {message}\n"
