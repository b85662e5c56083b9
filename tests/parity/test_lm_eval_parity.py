"""lm-evaluation-harness with our model and with its own, on the same weights and tasks of local files."""

from __future__ import annotations

import logging
import pathlib
from typing import Any

import numpy as np
import pytest

import gpt2jax
from gpt2jax.evaluation.evaluate import evaluate

lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("transformers")

# what these libraries say to each other
pytestmark = pytest.mark.filterwarnings("ignore")

TASKS = pathlib.Path(__file__).parent / "lm_eval_tasks"
NAMES = ["local_choice", "local_word", "local_rolling", "local_writing"]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Results and samples of our model and of the harness's own."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from gpt2jax.evaluation.lm_eval import HarnessModel

    model = gpt2jax.load("gpt2-mini")
    folder = tmp_path_factory.mktemp("hf") / "model"
    model.save(folder)
    logging.disable(logging.WARNING)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(TASKS)  # where the tasks' files are looked for
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        for harness_model in (
            HarnessModel(model, batch_size=4),
            HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4),
        ):
            found.append(
                lm_eval.simple_evaluate(
                    model=harness_model,
                    tasks=NAMES,
                    task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
                    bootstrap_iters=0,
                )
            )
    logging.disable(logging.NOTSET)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_same_scores(answers, name):
    ours, theirs = (answer["results"][name] for answer in answers)
    metrics = [key for key, value in theirs.items() if isinstance(value, float) and "stderr" not in key]
    assert metrics
    for metric in metrics:
        assert ours[metric] == pytest.approx(theirs[metric], rel=1e-4), metric


@pytest.mark.parametrize("name", NAMES)
def test_same_answers(answers, name):
    ours, theirs = (sorted(answer["samples"][name], key=lambda s: s["doc_id"]) for answer in answers)
    assert len(ours) == len(theirs) > 5
    for mine, other in zip(ours, theirs, strict=True):
        if name == "local_writing":
            assert mine["resps"] == other["resps"]
        else:
            ours_flat, theirs_flat = (np.array(s["resps"], float).ravel() for s in (mine, other))
            np.testing.assert_allclose(ours_flat, theirs_flat, rtol=1e-4, atol=1e-4)
    if name == "local_writing":
        assert all(len(sample["resps"][0][0]) > 2 for sample in ours)


def test_rolling_windows_are_those_of_evaluate(answers):
    samples = sorted(answers[1]["samples"]["local_rolling"], key=lambda s: s["doc_id"])
    texts = [sample["doc"]["text"] for sample in samples]
    result = evaluate(gpt2jax.load("gpt2-mini"), texts, sequence_length=256, windows="rolling")
    theirs = answers[1]["results"]["local_rolling"]
    assert result.word_perplexity == pytest.approx(theirs["word_perplexity,none"], rel=1e-4)
    assert result.byte_perplexity == pytest.approx(theirs["byte_perplexity,none"], rel=1e-4)
    assert result.bits_per_byte == pytest.approx(theirs["bits_per_byte,none"], rel=1e-4)


def test_registered_by_name():
    from lm_eval.api.registry import get_model

    from gpt2jax.evaluation.lm_eval import HarnessModel

    assert get_model("gpt2jax") is HarnessModel
    made = HarnessModel.create_from_arg_string(
        "model=gpt2-mini,max_length=64", {"batch_size": "auto", "max_batch_size": None, "device": "cpu"}
    )
    assert isinstance(made, HarnessModel) and made.max_length == 64 and made.batch_size == 32
    with pytest.raises(ValueError, match="max_length must be a whole number from 1 to .*, got 9999"):
        HarnessModel("gpt2-mini", max_length=9999)
    cases: tuple[tuple[str, Any], ...] = (
        ("batch_size", 0),
        ("batch_size", "many"),
        ("max_length", 0),
        ("max_gen_toks", 0),
        ("seed", -1),
    )
    for name, value in cases:
        settings: dict[str, Any] = {name: value}
        with pytest.raises(ValueError, match=f"{name} must be .*, got {value!r}"):
            HarnessModel("gpt2-mini", **settings)


def test_nothing_has_the_log_probability_zero():
    from lm_eval.api.instance import Instance

    from gpt2jax.evaluation.lm_eval import HarnessModel

    request = Instance(request_type="loglikelihood_rolling", doc={}, arguments=("",), idx=0)
    (answer,) = HarnessModel("gpt2-mini").loglikelihood_rolling([request])
    assert str(answer) == "0.0"
