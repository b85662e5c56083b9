"""Which texts `evaluate` and `compare` take: all that is given, unless a split is held out or asked for."""

from __future__ import annotations

import json

import pytest

from gpt2jax.cli import finetune, main
from gpt2jax.cli.compare import ComparedDataOptions, named_splits
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


def test_named_splits_tell_data_sets_and_splits_apart(tmp_path):
    for place in ("a", "b"):
        write_texts(tmp_path / place / "x.jsonl", 8)
    first, second, other = (
        DataOptions(data=str(tmp_path / name)) for name in ("a/x.jsonl", "b/x.jsonl", "b")
    )
    assert named_splits([first], []) == {"": (first, "all")}
    assert named_splits([first], ["test"]) == {"": (first, "test")}
    assert list(named_splits([first], ["validation", "test"])) == ["validation", "test"]
    assert named_splits([first, other], []) == {"x.jsonl": (first, "all"), "b": (other, "all")}
    assert list(named_splits([first, second], [])) == [first.data, second.data]
    assert list(named_splits([first, other], ["train", "test"])) == [
        "x.jsonl, train",
        "x.jsonl, test",
        "b, train",
        "b, test",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": ()}, "--data must be one or more data sets, each named once, got ''"),
        ({"data": ("a", "a")}, "--data must be one or more data sets, each named once, got 'a a'"),
        (
            {"data": ("a", "b"), "more_data": ("c",)},
            "--more-data must be absent with several --data, got 'c'",
        ),
    ],
)
def test_compared_data_options_refuse(options, message):
    with pytest.raises(ValueError, match=message):
        ComparedDataOptions(**options).each()


@pytest.mark.slow
def test_compare_several_splits_in_one_report(tmp_path, capsys):
    write_texts(tmp_path / "mine" / "train.jsonl", 3)
    write_texts(tmp_path / "mine" / "validation.jsonl", 12)
    write_texts(tmp_path / "mine" / "test.jsonl", 11)
    out = tmp_path / "out"
    main(
        ["compare", "a=gpt2-mini", "b=gpt2-mini", "--data", str(tmp_path / "mine"), "--sequence-length", "32"]
        + ["--split", "validation", "test", "--max-new-tokens", "2", "--prompts", "the", "--out", str(out)]
    )
    content = json.loads((out / "comparison.json").read_text())
    found = {name: each["data"]["documents"] for name, each in content["by_texts"].items()}
    assert found == {"validation": 12, "test": 11}
    assert content["by_texts"]["test"]["data"]["split"] == "test"
    assert content["paired"] == content["by_texts"]["validation"]["paired"]
    shown = " ".join(capsys.readouterr().out.split())
    for name in found:
        assert f"b on {name}: Paired difference" in shown
