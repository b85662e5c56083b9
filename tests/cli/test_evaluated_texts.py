"""Which texts `evaluate` and `compare` take: all that is given, unless a split is held out or asked for."""

from __future__ import annotations

import json

import pytest

from gpt2jax.cli import finetune, main
from gpt2jax.cli.finetune import _held_out_limits
from gpt2jax.cli.options import DataOptions, EvaluationOptions, evaluation_config, warn_if_trained_on
from gpt2jax.utils.notices import Notice


def write_texts(path, count):
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        "".join(json.dumps({"text": f"Return the array number {i}."}) + "\n" for i in range(count))
    )


@pytest.mark.parametrize(
    ("files", "split", "described"),
    [
        (["a.jsonl", "b.jsonl"], "all", "16 documents of DATA, all"),
        (["train.jsonl", "test.jsonl"], "test", "8 documents of DATA, split test"),
        (["train.jsonl", "val.jsonl"], "validation", "8 documents of DATA, split validation"),
        (["train.jsonl"], "all", "8 documents of DATA, all"),
    ],
)
def test_held_out_split_is_one_that_the_data_has_by_name_else_all(tmp_path, files, split, described):
    for name in files:
        write_texts(tmp_path / name, 8)
    data = DataOptions(data=str(tmp_path))
    assert data.held_out_split() == split
    words, origin = data.describe(split, len(data.texts(split)))
    assert words == described.replace("DATA", str(tmp_path)) and "total_documents" not in origin


@pytest.mark.parametrize(("split", "count"), [("test", 1), ("train[:50%]", 3), ("test+validation", 2)])
def test_describe_says_of_how_many_documents_a_split_by_content_is(tmp_path, split, count):
    write_texts(tmp_path / "mine" / "a.jsonl", 8)
    data = DataOptions(data=str(tmp_path / "mine"))
    words, origin = data.describe(split, len(data.texts(split)))
    assert words == f"{count} of 8 documents of {tmp_path / 'mine'}, split {split}"
    assert origin["total_documents"] == 8
    limited = DataOptions(data=str(tmp_path / "mine"), limit=3)
    assert limited.describe("all", 3)[0].startswith("the first 3 documents of ")


def test_warn_if_trained_on_the_texts(tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    content = {"data": {"source": ["a.txt", "b.txt"], "split": "train"}}
    (tmp_path / "run" / "run.json").write_text(json.dumps(content))
    data = DataOptions(data="a.txt", more_data=("b.txt",))
    for model in (tmp_path / "run", tmp_path / "run" / "model"):
        for split in ("all", "train"):
            with pytest.warns(
                Notice, match="was trained on split train of a.txt, which is among these texts"
            ):
                warn_if_trained_on(str(model), data, split)
    warn_if_trained_on(str(tmp_path / "run"), data, "test")
    warn_if_trained_on(str(tmp_path / "run"), DataOptions(data="a.txt"), "all")
    warn_if_trained_on("gpt2-mini", data, "all")


@pytest.mark.slow
def test_evaluate_and_compare_take_all_texts_and_say_so(tmp_path, capsys):
    write_texts(tmp_path / "mine" / "a.jsonl", 8)
    arguments = ["--data", str(tmp_path / "mine"), "--sequence-length", "32"]
    main(["evaluate", *arguments, "--out", str(tmp_path / "all.json")])
    main(["evaluate", *arguments, "--eval-split", "test", "--out", str(tmp_path / "test.json")])
    found = {name: json.loads((tmp_path / f"{name}.json").read_text())["data"] for name in ("all", "test")}
    assert found["all"]["documents"] == 8 and found["all"]["split"] == "all"
    assert found["test"]["documents"] == 1 and found["test"]["total_documents"] == 8
    shown = " ".join(capsys.readouterr().out.split())
    assert "8 documents of" in shown and "1 of 8 documents of" in shown
    out = str(tmp_path / "out")
    main(["compare", "a=gpt2-mini", "b=gpt2-mini", *arguments, "--max-new-tokens", "2", "--out", out])
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert content["data"]["documents"] == 8 and content["data"]["split"] == "all"
    assert "8 documents" in content["paired"]["b"]["warning"]
    shown = " ".join(capsys.readouterr().out.split())
    assert "texts 8 documents of" in shown and "Caution: the interval" in shown


def test_evaluation_config_takes_the_dtype_of_the_training(tmp_path):
    for name, dtype in (("a", "float16"), ("b", "bfloat16")):
        (tmp_path / name / "checkpoints" / "3").mkdir(parents=True)
        (tmp_path / name / "run.json").write_text(json.dumps({"finetune": {"compute_dtype": dtype}}))
    a, b = str(tmp_path / "a"), str(tmp_path / "b")

    def dtype_of(models, **settings):
        return evaluation_config(EvaluationOptions(**settings), models).compute_dtype

    assert dtype_of([a]) == dtype_of(["gpt2-mini", a]) == dtype_of([f"{a}/checkpoints/3"]) == "float16"
    assert dtype_of(["gpt2-mini"]) == dtype_of([a, b]) == "float32"
    assert dtype_of([a], compute_dtype="float32") == "float32"
    with pytest.raises(ValueError, match="stride must be None with windows='truncate', got 4"):
        dtype_of([a], stride=4)


def test_finetune_compares_on_all_held_out_documents():
    def limits(data="mine", **settings):
        return _held_out_limits(finetune.Options(source=DataOptions(data=data), **settings))

    assert limits() == (120, None) and limits("numeric-docs") == (120, 120)
    assert limits(eval_documents=7) == limits("numeric-docs", eval_documents=7) == (7, 7)
