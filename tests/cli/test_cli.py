"""The commands as a user meets them: what they write, and one line for a mistake."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import subprocess
import sys

import jax
import numpy as np
import pytest
import tyro
from commands import fails

import gpt2jax
from gpt2jax.cli import compare, finetune, main
from gpt2jax.cli.finetune import Options, finetune_config, imply_lora
from gpt2jax.cli.options import DataOptions
from gpt2jax.data import sources
from gpt2jax.lora.config import LoRAConfig

WORDS = ["the", "array", "of", "shape", "and", "dtype", "is", "returned", "when", "axis", "keepdims", "none"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A file of a user's own, its text in a column named body."""
    path = tmp_path_factory.mktemp("data") / "my.jsonl"
    rows = [" ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 30)) + f" {i}" for i in range(40)]
    path.write_text("".join(json.dumps({"title": f"t{i}", "body": row}) + "\n" for i, row in enumerate(rows)))
    return path


SHORT = ["--steps", "2", "--batch-size", "4", "--sequence-length", "32", "--max-new-tokens", "8"]


@pytest.fixture(scope="module")
def run(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    options = ["--data", str(texts), "--text-column", "body", "--prompts", "the array", "", *SHORT]
    main(["finetune", *options, "--out", str(folder)])
    return folder


@pytest.mark.slow
def test_finetune_writes_a_run_and_a_report(run):
    names = {path.name for path in run.iterdir()}
    assert names >= {
        "run.json",
        "metrics.jsonl",
        "checkpoints",
        "model",
        "report.html",
        "report.md",
        "comparison.json",
    }
    content = json.loads((run / "comparison.json").read_text())
    assert [model["name"] for model in content["models"]] == ["generic", "specialised"]
    assert content["models"][1]["loss"] < content["models"][0]["loss"]
    assert {g["prompt"] for g in content["generations"]} == {"the array", ""}
    assert gpt2jax.load(run).tokenizer is not None


@pytest.mark.slow
def test_finetune_repeats_a_finished_run_from_its_checkpoint(run, texts, capsys):
    before = json.loads((run / "comparison.json").read_text())
    options = ["--data", str(texts), "--text-column", "body", "--prompts", "the array", "", *SHORT]
    assert "holds another run" in fails(capsys, "finetune", *options, "--out", str(run))
    main(["finetune", *options, "--out", str(run), "--resume"])
    after = json.loads((run / "comparison.json").read_text())
    assert after["models"] == before["models"] and after["paired"] == before["paired"]
    assert [g["text"] for g in after["generations"]] == [g["text"] for g in before["generations"]]


@pytest.mark.slow
def test_finetune_with_adapters_on_an_int8_base(texts, small, tmp_path, monkeypatch):
    """The comparison has the model's own weights, back from the host, and the same with the adapters."""
    compared = []
    monkeypatch.setattr(
        finetune, "_compare", lambda options, training, model, result, *rest: compared.append((model, result))
    )
    options = ["--data", str(texts), "--text-column", "body", *SHORT, "--lora", "--base-dtype", "int8"]
    main(["finetune", "--model", small, *options, "--out", str(tmp_path / "run")])
    ((model, result),) = compared
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(model.params))
    base, trained = gpt2jax.load(small), gpt2jax.load(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, model.params, base.params)
    jax.tree.map(np.testing.assert_array_equal, result.model.params, trained.params)
    jax.tree.map(np.testing.assert_array_equal, result.model.adapters, trained.adapters)
    assert trained.adapters is not None
    assert trained.adapters["h"]["attn"]["c_attn"]["lora_b"].any()


@pytest.mark.slow
def test_evaluate(run, texts, tmp_path, capsys):
    data = ["--data", str(texts), "--text-column", "body", "--sequence-length", "32", "--eval-split", "test"]
    main(["evaluate", "--model", str(run), *data, "--out", str(tmp_path / "figures.json")])
    figures = json.loads((tmp_path / "figures.json").read_text())
    compared = json.loads((run / "comparison.json").read_text())["models"][1]
    assert figures["loss"] == compared["loss"] and figures["keras_accuracy"] == compared["keras_accuracy"]
    assert figures["data"]["source"] == str(texts) and figures["data"]["revision"] is None
    assert sum(entry["tokens"] for entry in figures["loss_by_position"]) == figures["tokens"] - 2
    assert "there already" in fails(capsys, "evaluate", *data, "--out", str(tmp_path / "figures.json"))


@pytest.mark.slow
def test_three_models_twice_in_the_same_words(run, texts, tmp_path, capsys, monkeypatch):
    """A seeded repeat is the same file except for times, wherever it is written."""
    models = ["gpt2-mini", f"mine={run}", f"copy={run / 'model'}"]
    data = ["--data", str(texts), "--text-column", "body", "--sequence-length", "32", "--eval-split", "test"]
    arguments = ["compare", *models, *data, "--max-new-tokens", "4", "--prompts", "the", "", "--seed", "3"]
    found = []
    for name in ("one", "two"):
        argv = [*arguments, "--out", str(tmp_path / name)]
        monkeypatch.setattr(sys, "argv", ["gpt2jax", *argv])
        main(argv)
        text = (tmp_path / name / "comparison.json").read_text()
        found.append(re.sub(r'"(seconds|tokens_per_second)": [\d.]+', "", text))
        assert all((tmp_path / name / file).stat().st_size for file in ("report.html", "report.md"))
    assert found[0] == found[1]
    shown = " ".join(capsys.readouterr().out.split())
    assert "Scored: the first 31 tokens of each text and an end token" in shown
    content = json.loads((tmp_path / "one" / "comparison.json").read_text())
    assert [model["name"] for model in content["models"]] == ["gpt2-mini", "mine", "copy"]
    assert content["models"][1]["loss"] == content["models"][2]["loss"]
    assert content["paired"]["mine"] == content["paired"]["copy"] and len(content["generations"]) == 6
    assert content["command"] == shlex.join(["gpt2jax", *arguments])
    assert content["data"]["split"] == "test" and content["data"]["source"] == str(texts)
    assert "holds a comparison" in fails(capsys, *arguments, "--out", str(tmp_path / "one"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["compare", "gpt2-mini"], "models must be at least two, got 1; for one model use evaluate"),
        (["compare", "a=", "gpt2-mini"], "models must be NAME=MODEL or MODEL each, got 'a='"),
        (["compare", "=gpt2-mini", "gpt2-mini"], "models must be NAME=MODEL or MODEL each, got '=gpt2-mini'"),
        (
            ["compare", "gpt2-mini", "b=gpt2-mini", "--out", "FILE"],
            "FILE is a file; give the name of a folder",
        ),
        (["compare", "gpt2-mini", "b=gpt2-mini", "--sequence-length", "0"], "--sequence-length must be"),
        (
            ["compare", "gpt2-mini", "b=gpt2-mini", "--split", "test", "test"],
            "--eval-split must be splits, each named once, got 'test test'",
        ),
        (
            ["compare", "gpt2-mini", "--splt", "test"],
            "there is no option --splt (did you mean --split?); see",
        ),
        (["evaluate", "--out", "FILE"], "FILE is a file; give the name of a folder"),
        (["evaluate", "--out", "FILE/inside.json"], "FILE is a file; give the name of a folder"),
        (["evaluate", "--sequence-length", "0"], "must be a whole number of at least 2, or None, got 0"),
        (["evaluate", "--model", "gpt2-minni"], "there is no model 'gpt2-minni'; did you mean 'gpt2-mini'"),
        (["evaluate", "--data-revision", "main"], "is not on the hub: it has no revision 'main'"),
        (["evaluate", "--eval-split", "tset"], "there is no split 'tset'; did you mean 'test'?"),
        (["evaluate", "--eval-split", "test[:x]"], "split must be a split such as train, train[:50%]"),
    ],
)
def test_mistakes_of_evaluate_and_compare(texts, tmp_path, capsys, options, message):
    (tmp_path / "file").write_text("precious")
    options = [option.replace("FILE", str(tmp_path / "file")) for option in options]
    line = fails(capsys, *options, "--data", str(texts), "--text-column", "body")
    assert message.replace("FILE", str(tmp_path / "file")) in line
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_all_splits_are_of_the_commit_that_a_name_has_at_first(monkeypatch):
    asked = []

    def pin_revision(source, revision):
        asked.append((source, revision))
        return "c" * 40

    monkeypatch.setattr(sources, "pin_revision", pin_revision)
    pinned = DataOptions(data="pubmed", data_revision="main").pinned()
    assert asked == [("pubmed", "main")]
    assert pinned.origin("test") == {"source": "pubmed", "split": "test", "revision": "c" * 40}
    options = compare.Options(("a", "b"), training_data="pubmed")
    read = []
    monkeypatch.setattr(sources, "Texts", lambda source, split, **o: read.append((source, o["revision"])))
    compare.training_texts(options, [DataOptions(data="arxiv"), pinned])
    compare.training_texts(dataclasses.replace(options, training_data="other/data"), [pinned])
    assert read == [("pubmed", "c" * 40), ("other/data", None)]


@pytest.mark.slow
def test_evaluate_into_a_folder(texts, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    out = tmp_path / "evaluation"
    data = ["--data", str(texts), "--text-column", "body", "--sequence-length", "32", "--windows", "rolling"]
    main(["evaluate", *data, "--out", str(out)])
    assert "in rolling windows of 32" in capsys.readouterr().out
    first = json.loads((out / "evaluation.json").read_text())
    assert str(tmp_path) not in (out / "evaluation.json").read_text()
    assert first["schema"] == "gpt2jax.evaluation" and first["word_perplexity"] > first["perplexity"] > 1
    assert "holds an evaluation" in fails(capsys, "evaluate", *data, "--out", str(out))
    main(["evaluate", *data, "--out", str(out), "--resume"])
    again = json.loads((out / "evaluation.json").read_text())
    assert {**again, "seconds": 0} == {**first, "seconds": 0}
    other = fails(capsys, "evaluate", *data, "--limit", "1", "--out", str(out), "--resume")
    assert "other texts" in other
    assert "--out FOLDER" in fails(capsys, "evaluate", *data, "--resume")


def test_imply_lora_refuses_no_lora(capsys):
    message = fails(capsys, "finetune", "--lora.rank", "8", "--no-lora")
    assert message == "gpt2jax finetune: error: --lora.rank does not go with --no-lora"


def test_finetune_config_with_adapters_of_every_kind():
    words = "--lora.rank 4 --lora.use-rslora --lora.use-dora --lora.targets attn.q mlp.*"
    words += " --lora.rank-pattern h.3.mlp.c_fc 2"

    def config(words: str) -> gpt2jax.FinetuneConfig:
        return finetune_config(tyro.cli(Options, args=imply_lora("finetune", words.split())))

    every = config(f"--lora {words} --lora.alpha 16 --base-dtype int8")
    assert config(f"{words} --lora.alpha=16 --base-dtype int8") == every  # they ask for adapters
    assert every.base_dtype == "int8" and every.lora == LoRAConfig(
        4, 16, targets=("attn.q", "mlp.*"), use_rslora=True, use_dora=True, rank_pattern={"h.3.mlp.c_fc": 2}
    )
    assert config("").lora is None and config("--lora").lora == LoRAConfig()
    for words in ("--lora --lora.rank 9", "--lora.rank 9 --lora.use-rslora"):
        plain = config(words).lora
        assert plain is not None and plain.rank == 9 and plain.scale == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "missing.jsonl"], "missing.jsonl"),
        (["--text-column", "nope"], "title"),
        (["--sequence-length", "300"], "at most the model's context of 256 tokens, got 300"),
        (["--model", "gpt3"], "there is no model 'gpt3'; did you mean"),
        (["--model", "README.md"], "README.md"),
        (["--lora.targets", "c_attn"], "attn.c_attn"),
        (["--lora.rank-pattern", "h.0", "x"], "--lora.rank-pattern"),
        (["--lora.rank", "0"], "rank"),
        (["--eval-documents", "0"], "--eval-documents must be a positive whole number, got 0"),
        (["--max-new-tokens", "300"], "prompt 0 has"),
        (["--process", "1"], "several processes need --coordinator HOST:PORT"),
        (
            ["--coordinator", "a:1", "--processes", "2", "--process", "2"],
            "--process must be from 0 to 1, got 2",
        ),
        (
            ["--coordinator", "here", "--processes", "2", "--process", "0"],
            "must be HOST:PORT or auto, got 'here'",
        ),
        (["--steps", "0"], "--steps must be a positive whole number, or None, got 0"),
        (["--stepz", "3"], "there is no option --stepz (did you mean --steps?); see"),
        (
            [
                "--num-train-epochs",
                "3",
                "--r",
                "8",
                "--lora_alpha=4",
                "--output_dir",
                "x",
                "--fsdp_config",
                "y",
            ],
            "there is no option --num-train-epochs (here --epochs), --r (here --lora.rank), "
            "--lora_alpha (here --lora.alpha), --output_dir (here --out), --fsdp_config; see",
        ),
        (["--steps", "many"], "--steps must be a whole number, or None, got 'many'; see"),
        (["--steps"], "--steps needs a value; see"),
        (["--batch-size", "1.5"], "--batch-size must be a whole number, got '1.5'; see"),
        (["--beta1", "x"], "--beta1 must be a number, got 'x'; see"),
        (["--packing", "rows"], "--packing must be one of None, concat, packed, padded, got 'rows'; see"),
        (["--lora.rnk", "4"], "there is no option --lora.rnk (did you mean --lora.rank?); see"),
        (["extra"], "there is no place for 'extra'; options begin with --; see"),
        (["--freeze", "nothing"], "freeze must be patterns that match parameters, got ['nothing']"),
        (
            ["--lora.rank-pattern", "h.9.attn.c_attn", "4"],
            "lora.rank-pattern must match linear layers with an adapter",
        ),
        (["--out", "FILE/inside"], "is a file; give the name of a folder"),
        (["--init", "random", "--model", "mine"], "with --init random, got 'mine'"),
    ],
)
def test_finetune_mistakes_are_one_line_and_leave_nothing(texts, tmp_path, capsys, options, message):
    out = tmp_path / "out"
    defaults = {"--data": str(texts), "--out": str(out), "--text-column": "body"}
    arguments = [word for pair in defaults.items() if pair[0] not in options for word in pair]
    line = fails(capsys, "finetune", *arguments, *(word.replace("FILE", str(texts)) for word in options))
    assert message in line and line.startswith("gpt2jax finetune: error: ")
    assert not out.exists()


@pytest.mark.parametrize(
    ("content", "message"), [("", "empty"), ('{"text": ""}\n' * 30, "shorter than two tokens")]
)
def test_finetune_refuses_texts_without_anything_to_learn(tmp_path, capsys, content, message):
    (tmp_path / "texts.jsonl").write_text(content)
    line = fails(capsys, "finetune", "--data", str(tmp_path / "texts.jsonl"), "--out", str(tmp_path / "out"))
    assert message in line or "no text" in line
    assert not (tmp_path / "out").exists()


def test_data_options_streams_of_the_hub_have_a_fingerprint():
    here, hub = DataOptions(data="my.jsonl"), DataOptions(data="a/b", data_revision="c" * 40)
    assert here.iterate("train").fingerprint is None  # a file may change
    names = [
        hub.iterate(split, limit=limit).fingerprint
        for split, limit in (("train", None), ("test", None), ("train", 3))
    ]
    assert len(set(names)) == 3 and all("c" * 40 in str(name) for name in names)


def test_lm_eval_names_what_to_install():
    code = "import sys, runpy; sys.modules['lm_eval'] = None\n"
    code += "runpy.run_module('gpt2jax.evaluation.lm_eval', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("needs lm-evaluation-harness: pip install lm-eval")
    assert "Traceback" not in done.stderr
