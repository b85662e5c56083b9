"""The folder of a run: its log after a crash, and what it refuses to go on with."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from tiny_models import TINY, random_params

from gpt2jax.data.tokenization import tokenize_documents
from gpt2jax.language_model import LanguageModel
from gpt2jax.lora.adapters import init_adapters
from gpt2jax.lora.config import LoRAConfig
from gpt2jax.train.config import FinetuneConfig
from gpt2jax.train.run_folder import RunFolder, run_description
from gpt2jax.utils.notices import Notice

CONFIG = FinetuneConfig(steps=5, learning_rate=1e-3, lora=LoRAConfig())
DOCUMENTS = tokenize_documents([[1, 2, 3], [4, 5]], None, vocab_size=101)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel(TINY, random_params(), source="models/one")


@pytest.fixture
def path(model, tmp_path):
    RunFolder(tmp_path / "run").begin(model, CONFIG, DOCUMENTS)
    return tmp_path / "run"


def test_run_folder_expands_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunFolder("~/runs/one").path == tmp_path / "runs" / "one"


def test_read_metrics_after_a_kill(path):
    folder = RunFolder(path, resume=True)
    for step in (2, 4, 6):
        folder.append_metrics({"step": step, "loss": step / 3})
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')  # killed in the middle of a line
    expected = [{"step": 2, "loss": 2 / 3}, {"step": 4, "loss": 4 / 3}]
    assert folder.read_metrics(up_to=5) == expected
    folder.append_metrics({"step": 6, "loss": 1.0})
    lines = (path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [*expected, {"step": 6, "loss": 1.0}]
    assert folder.read_metrics(up_to=0) == []


def test_run_folder_with_damaged_files(path, model):
    folder = RunFolder(path, resume=True)
    lines = (
        b'[1]\n5\n{"loss": 1.0}\n{"step": "2"}\n{"\xff": 1\n'
        + b"[" * 100_000
        + b'\n{"step": 2, "loss": 1.0}\n'
    )
    (path / "metrics.jsonl").write_bytes(lines)
    assert folder.read_metrics(up_to=5) == [{"step": 2, "loss": 1.0}]
    for content, message in (
        ('{"finetune', "not JSON"),
        ("", "not JSON"),
        ("[]", "must hold an object"),
        ('{"finetune": 1}', "finetune must be an object"),
        ("{}", "no f"),
    ):
        (path / "run.json").write_text(content)
        with pytest.raises(ValueError, match=f"run.json.*{message}"):
            folder.begin(model, CONFIG, DOCUMENTS)


def test_lock_refuses_a_second_run(path):
    with RunFolder(path, resume=True).lock():
        for how in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(FileExistsError, match="another run is going on in .*run"):
                with RunFolder(path, **how).lock():
                    pass
    with RunFolder(path, resume=True).lock():
        pass


def test_begin_resumes_with_settings_that_may_differ(path, model):
    RunFolder(path, resume=True).begin(model, CONFIG, DOCUMENTS)
    renamed = dataclasses.replace(model, source="./models/one")
    config = dataclasses.replace(CONFIG, log_every=1, eval_every=2, checkpoint_every=3, keep_checkpoints=4)
    source = {"source": "owner/name", "split": "train", "revision": "c" * 40}  # what counts are the texts
    RunFolder(path, resume=True).begin(renamed, config, DOCUMENTS, source)


def test_begin_refuses_what_must_agree(path, model):
    def refused(model=model, documents=DOCUMENTS, **changes) -> str:
        with pytest.raises(ValueError, match="cannot resume") as error:
            RunFolder(path, resume=True).begin(model, dataclasses.replace(CONFIG, **changes), documents)
        return str(error.value)

    assert "finetune.seed was 0, is 7" in refused(seed=7)
    assert "finetune.lora.rank was 32, is 4" in refused(lora=LoRAConfig(rank=4))
    assert "finetune.lora.rank was 32, is None" in refused(lora=None)
    assert "finetune.base_dtype was None, is 'int8'" in refused(base_dtype="int8")
    assert "data.sha256" in refused(documents=tokenize_documents([[1, 2, 3], [4, 6]], None, vocab_size=101))
    # another model of the same shape under the same name
    other = dataclasses.replace(model, params=random_params(seed=1))
    assert "base_sha256" in refused(model=other)
    shape = dataclasses.replace(TINY, layer_norm_epsilon=1e-6)
    assert "model_config.layer_norm_epsilon was 1e-05, is 1e-06" in refused(
        model=dataclasses.replace(model, config=shape)
    )


def test_begin_takes_another_length_if_the_steps_done_have_the_same_rates(path, model):
    def begins(config: FinetuneConfig, **changes: Any) -> str | None:
        folder = tmp / str(len(list(tmp.iterdir())))
        RunFolder(folder).begin(model, config, DOCUMENTS)
        (folder / "checkpoints" / "5").mkdir(parents=True)
        (folder / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir()
        try:
            RunFolder(folder, resume=True).begin(model, dataclasses.replace(config, **changes), DOCUMENTS)
        except ValueError as error:
            return str(error).replace(str(folder), "RUN")
        assert json.loads((folder / "run.json").read_text())["finetune"]["steps"] == changes["steps"]
        return None

    tmp = path.parent / "runs"
    tmp.mkdir()
    constant = dataclasses.replace(CONFIG, schedule="constant", warmup_steps=2)
    stable = dataclasses.replace(CONFIG, schedule="wsd", steps=10)  # which falls from step 8 on
    for config, steps in ((constant, 9), (stable, 20), (stable, 7)):
        with pytest.warns(Notice, match=f"had {config.steps} steps, and goes on to step {steps}$"):
            assert begins(config, steps=steps) is None
    hint = "; in a run of that length the steps that are done would have been other ones: "
    hint += "--model RUN trains on from its result"
    assert begins(CONFIG, steps=9) == f"cannot resume RUN: finetune.steps was 5, is 9{hint}"
    for config, steps in ((constant, 4), (stable, 4), (dataclasses.replace(constant, warmup_steps=7), 9)):
        assert (
            begins(config, steps=steps)
            == f"cannot resume RUN: finetune.steps was {config.steps}, is {steps}{hint}"
        )
    assert "finetune.seed was 0, is 1; finetune.steps was 5, is 9" in str(begins(constant, steps=9, seed=1))


def test_begin_resumes_a_run_of_version_1(path, model):
    """Written before settings were renamed, and before some of them existed."""
    file = path / "run.json"
    content = json.loads(file.read_text())
    settings = content["finetune"]
    for old, new in (
        ("accumulation", "gradient_accumulation_steps"),
        ("layout", "packing"),
        ("final_learning_rate", "final_lr_ratio"),
        ("decay_share", "decay_fraction"),
        ("track", "trackers"),
    ):
        settings[old] = settings.pop(new)
    del settings["z_loss"]
    for old, packing in (("windows", "concat"), ("documents", "padded"), ("packed", "packed")):
        settings["layout"] = old
        file.write_text(json.dumps({**content, "version": 1}))
        RunFolder(path, resume=True).begin(model, dataclasses.replace(CONFIG, packing=packing), DOCUMENTS)
    with pytest.raises(ValueError, match="finetune.packing was 'packed', is 'concat'"):
        RunFolder(path, resume=True).begin(model, CONFIG, DOCUMENTS)
    settings["decay_share"] = 0.5
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"finetune\.decay_fraction was 0\.5, is 0\.2"):
        RunFolder(path, resume=True).begin(model, CONFIG, DOCUMENTS)


def test_lock_refuses_a_run_that_came_after_the_check(path, model):
    folder = RunFolder(path.parent / "new")
    RunFolder(path.parent / "new").begin(model, CONFIG, DOCUMENTS)
    with pytest.raises(FileExistsError, match="holds another run"), folder.lock():
        pass


def test_begin_resumes_an_empty_folder(model, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new"):
        RunFolder(tmp_path / name, resume=True).begin(model, CONFIG, DOCUMENTS)
        content = json.loads((tmp_path / name / "run.json").read_text())
        assert content["base_model"] == "models/one" and content["data"]["tokens"] == 5


def test_begin_removes_what_a_killed_run_was_writing(model, tmp_path):
    (tmp_path / ".model.x.part").mkdir()
    for name in (".run.json.x.part", ".model.x.part/model.safetensors"):
        (tmp_path / name).write_text("{")
    RunFolder(tmp_path, resume=True).begin(model, CONFIG, DOCUMENTS)
    (tmp_path / ".metrics.jsonl.x.part").write_text("{")
    RunFolder(tmp_path, resume=True).begin(model, CONFIG, DOCUMENTS)
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.json"]


def test_begin_overwrites_the_run_and_nothing_else(path, model):
    own = ["checkpoints/3/state", "adapter/adapter_config.json", "base/config.json", "model/config.json"]
    for name in (*own, "mine/notes.txt"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("old")
    for name in ("metrics.jsonl", "report.html", "comparison.json"):
        (path / name).write_text("old")
    RunFolder(path, overwrite=True).begin(model, dataclasses.replace(CONFIG, seed=9), DOCUMENTS)
    assert sorted(entry.name for entry in path.iterdir()) == ["mine", "run.json"]
    assert json.loads((path / "run.json").read_text())["finetune"]["seed"] == 9


def test_begin_renames_the_report_of_a_run_that_goes_on(tmp_path, model):
    config, path = dataclasses.replace(CONFIG, schedule="constant"), tmp_path / "run"
    RunFolder(path).begin(model, config, DOCUMENTS)
    for name in ("report.html", "comparison.json"):
        (path / name).write_text("old")
    RunFolder(path, resume=True).begin(model, config, DOCUMENTS)  # of the same length
    assert (path / "report.html").exists()
    with pytest.warns(Notice) as notices:
        RunFolder(path, resume=True).begin(model, dataclasses.replace(config, steps=9), DOCUMENTS)
    names = {"report-5-steps.html", "comparison-5-steps.json"}
    assert {entry.name for entry in path.iterdir()} == {"run.json", *names}
    said = f"the report in {path} is of the run of 5 steps, and is now called "
    assert f"{said}comparison-5-steps.json, report-5-steps.html" in [str(n.message) for n in notices]
    RunFolder(path, overwrite=True).begin(model, config, DOCUMENTS)
    assert [entry.name for entry in path.iterdir()] == ["run.json"]


def test_run_folder_refuses_resume_with_overwrite(path):
    with pytest.raises(ValueError, match="resume must be False with overwrite=True"):
        RunFolder(path, resume=True, overwrite=True)


def test_run_folder_refuses_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file; expected a folder"):
        RunFolder(tmp_path / "file")


def test_run_description_has_no_home_folder(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = dataclasses.replace(model, source=f"{tmp_path}/models/one")
    config = dataclasses.replace(CONFIG, token_cache=f"{tmp_path}/.cache/tokens")
    source = {"source": [str(tmp_path), f"{tmp_path}2/data"], "split": "train", "revision": None}
    description = run_description(model, config, DOCUMENTS, source)
    assert description["base_model"] == "~/models/one"
    assert description["finetune"]["token_cache"] == "~/.cache/tokens"
    assert description["data"]["source"] == ["~", f"{tmp_path}2/data"]  # another folder


def test_finish_keeps_a_base_without_a_name(model, tmp_path):
    adapters = init_adapters(TINY, LoRAConfig())
    for source in (None, "models/one"):
        trained = dataclasses.replace(model, adapters=adapters, lora=LoRAConfig(), source=source)
        folder = RunFolder(tmp_path / str(bool(source)))
        folder.begin(trained, CONFIG, DOCUMENTS)
        folder.finish(trained, [])
        assert (folder.path / "adapter").is_dir() and not (folder.path / "model").exists()
        assert (folder.path / "base").is_dir() == (source is None)


def test_finish_writes_a_model_card(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = RunFolder(tmp_path / "run")
    folder.begin(model, CONFIG, DOCUMENTS, {"source": f"{tmp_path}/a|<b>`[c].jsonl", "split": "train"})
    adapted = dataclasses.replace(model, adapters=init_adapters(TINY, LoRAConfig()), lora=LoRAConfig())
    folder.finish(adapted, [{"step": 4, "loss": 2.5, "validation_loss": 2.25}, {"step": 5, "loss": 2.0}])
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    for line in (
        "library_name: peft",
        'base_model: "models/one"',
        r"| source | ~/a\|\<b\>\`\[c\].jsonl |",
        "| documents | 2 |",
        "| learning_rate | 0.001 |",
        "| validation_loss | 2.25 |",
        "| loss | 2 |",
    ):
        assert line in card.splitlines()
    assert str(tmp_path) not in card


def test_describe_space_names_the_largest_first(path):
    (path / "run.json").write_bytes(bytes(100_000))
    (path / "metrics.jsonl").write_bytes(bytes(1000))
    (path / "checkpoints" / "5").mkdir(parents=True)
    (path / "checkpoints" / "5" / "data").write_bytes(bytes(2_300_000))
    said = RunFolder(path, resume=True).describe_space()
    assert said.startswith(
        "2.4 MB: checkpoints 2.3 MB, run.json 0.1 MB; the folder checkpoints can be deleted when"
    )
