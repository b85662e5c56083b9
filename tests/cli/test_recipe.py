"""The recipe of `finetune` follows from what the data is, and the first lines of a run say what it is."""

from __future__ import annotations

import dataclasses
import json
import zipfile

import numpy as np
import pytest

from gpt2jax.cli.compare import trainings
from gpt2jax.cli.finetune import (
    Options,
    _describe_texts,
    _texts,
    compared_options,
    finetune_config,
    stage_names,
)
from gpt2jax.cli.options import DataOptions, ProcessOptions
from gpt2jax.data.documents import Documents, to_offsets
from gpt2jax.data.hub import DATA_VARIABLE
from gpt2jax.language_model import from_config
from gpt2jax.model.config import PRESETS
from gpt2jax.train.config import FinetuneConfig
from gpt2jax.train.trainer import plan_run
from gpt2jax.utils.notices import Notice

PAPER = {
    "article_id": "1",
    "article_text": ["One .", "Two ."],
    "section_names": ["i"],
    "sections": [["One ."]],
}


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """The archive of pubmed, as --data pubmed finds it."""
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    with zipfile.ZipFile(tmp_path / "pubmed-dataset.zip", "w") as archive:
        for name in ("train", "val", "test"):
            archive.writestr(f"pubmed-dataset/{name}.txt", json.dumps(PAPER) + "\n")
    return tmp_path / "pubmed-dataset.zip"


def packing(data, **options):
    return finetune_config(Options(source=DataOptions(data=str(data)), cache_tokens=False, **options)).packing


def test_finetune_config_packs_papers_alike_by_every_name(archive):
    assert packing("pubmed") == "padded"
    assert packing(archive) == "padded"
    assert packing(archive.rename(archive.with_name("mine.zip"))) == "padded"
    hub_row = {"article": "One .", "abstract": "Short .", "section_names": "i"}
    (archive.parent / "rows.jsonl").write_text(json.dumps(hub_row) + "\n")
    assert packing(archive.parent / "rows.jsonl") == "padded"
    assert packing("pubmed", packing="concat") == "concat"


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", '{"text": "One ."}\n'), ("a.jsonl", '{"article": "One ."}\n'), ("pubmed.txt", "One .\n")],
)
def test_finetune_config_trains_on_all_of_other_texts(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert packing(tmp_path / name) == "concat"
    assert packing("numeric-docs") == "concat"


def test_describe_texts_names_splits_and_counts():
    options = Options(source=DataOptions(data="mine", limit=3), eval_documents=2, eval_split="all")
    described = _describe_texts(options, compared_options(options), ["a"] * 3, ["b"], ["c"] * 2)
    expected = "the first 3 of split train to train on, 1 of split validation for validation, "
    assert described == f"documents of mine: {expected}the first 2 of split all for the comparison"


def test_compared_options_take_data_of_ones_own(tmp_path):
    file = tmp_path / "held-out.jsonl"
    file.write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(5)))
    options = Options(source=DataOptions(data="mine", more_data=("more",)), eval_data=str(file))
    compared = compared_options(options)
    assert (compared.source.source, compared.eval_split) == (str(file), "all")
    assert _texts(compared, "all", limit=None) == [f"text {i}" for i in range(5)]
    described = _describe_texts(options, compared, ["a"], ["b"], ["c"] * 5)
    assert described.endswith(f"5 of split all of {file} for the comparison")
    assert compared_options(dataclasses.replace(options, eval_split="test")).eval_split == "test"
    assert compared_options(Options()).eval_split == "test"
    with pytest.raises(ValueError, match="--eval-data must be absent with --no-compare, got"):
        compared_options(dataclasses.replace(options, compare=False))


@pytest.mark.slow
def test_run_plan_describes_the_run():
    model = from_config(PRESETS["gpt2-mini"], seed=0)
    lengths = np.full(10, 9)
    documents = Documents(np.zeros(90, np.int32), to_offsets(lengths))
    config = FinetuneConfig(epochs=3, batch_size=5, sequence_length=8, packing="padded", learning_rate=1e-3)
    shown = plan_run(model, config, documents).describe(config)
    assert shown.startswith(
        "6 steps of 5 rows, 3 epochs of 10 rows; rows of 8 tokens, the first tokens of each text"
    )
    short = dataclasses.replace(config, steps=1, batch_size=10)
    assert (
        plan_run(model, short, documents).describe(short).startswith("1 step of 10 rows, 1 epoch of 10 rows;")
    )
    assert "adamw with learning rate 0.001, float32" in shown and shown.endswith("(cpu)")


def test_trainings_are_those_of_the_runs_among_models(tmp_path):
    config = FinetuneConfig(steps=9, compute_dtype="float16", token_cache="tokens")
    run = {"base_model": "gpt2-mini", "data": {"documents": 4}, "finetune": dataclasses.asdict(config)}
    (tmp_path / "run.json").write_text(json.dumps(run))
    found = trainings({"generic": "gpt2-mini", "mine": str(tmp_path)})
    assert list(found) == ["mine"] and found["mine"]["data"] == {"documents": 4}
    assert found["mine"]["settings"]["steps"] == 9 and "token_cache" not in found["mine"]["settings"]
    (tmp_path / "run.json").write_text(json.dumps(run | {"finetune": {"steps": "9"}}))
    assert trainings({"mine": str(tmp_path)}) == {}


def test_stage_names_follow_the_lineage(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, base in ((first, "gpt2-mini"), (second, str(first / "model"))):
        (folder / "model").mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"base_model": base}))
    assert stage_names("gpt2-mini") == ("generic", "specialised")
    assert stage_names(str(first)) == stage_names(str(first / "model")) == ("stage 1", "stage 2")
    assert stage_names(str(second)) == ("stage 2", "stage 3")
    (first / "run.json").write_text(json.dumps({"base_model": str(first)}))
    assert stage_names(str(first))[0] == "stage 20"


@pytest.mark.parametrize(
    ("variables", "starts", "said"),
    [
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "a[1-2]"}, True, "srun started 2 processes"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, True, "mpirun started 4 processes, which train together"),
        ({"SLURM_NTASKS": "2"}, False, "SLURM_NTASKS is 2, but this process trains alone"),
    ],
)
def test_process_options_join_what_srun_and_mpirun_start(monkeypatch, variables, starts, said):
    calls = []
    monkeypatch.setattr("jax.distributed.initialize", lambda **given: calls.append(given))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.warns(Notice, match=said):
        ProcessOptions().initialize()
    assert calls == [{"num_processes": None, "process_id": None}] * starts
    ProcessOptions(processes=1).initialize()
    assert len(calls) == starts
