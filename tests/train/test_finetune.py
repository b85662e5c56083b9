"""Runs: their folder, their history, and that a stopped and resumed one ends as if it had never stopped."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import TINY, random_params

import gpt2jax.train.step as training_step
import gpt2jax.train.trainer as trainer
from gpt2jax.data.tokenization import tokenize_documents
from gpt2jax.evaluation.evaluate import evaluate
from gpt2jax.language_model import LanguageModel
from gpt2jax.loading import load
from gpt2jax.lora.config import LoRAConfig
from gpt2jax.tokenizer.bpe import Tokenizer
from gpt2jax.train.config import FinetuneConfig
from gpt2jax.train.finetune import finetune
from gpt2jax.train.log import NonFiniteError, TrainLog
from gpt2jax.utils.notices import Notice

CONFIG = FinetuneConfig(
    steps=12, batch_size=4, sequence_length=16, log_every=3, eval_every=6, checkpoint_every=4
)


def texts(count: int = 30) -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [(np.arange(n) % 7 * 3 + generator.integers(3)).tolist() for n in generator.integers(4, 40, count)]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel(TINY, random_params(noise=0.02))


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """A run from beginning to end, and its folder."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    return finetune(model, texts(), CONFIG, validation_texts=texts(3), output=folder, progress=False)


def assert_same(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.slow
def test_finetune_history(finished, model):
    history = finished.history
    assert [entry["step"] for entry in history] == [3, 6, 9, 12]
    assert history[-1]["loss"] < history[0]["loss"] - 0.3
    assert ["validation_loss" in entry for entry in history] == [False, True, False, True]
    assert history[-1]["tokens"] == sum(
        trainer.Batches(tokenize_documents(texts(), None, vocab_size=101), "concat", 16, 4, 100, 0)
        .batch(step)["loss_mask"]
        .sum()
        for step in range(12)
    )
    lines = (finished.output / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == history


@pytest.mark.slow
def test_finetune_leaves_the_given_model_alone(finished, model):
    assert_same(model.params, random_params(noise=0.02))
    assert (finished.model.params["wte"]["embedding"] != model.params["wte"]["embedding"]).any()


@pytest.mark.slow
def test_finetune_returns_a_model_like_a_loaded_one(finished, model):
    """Bound to no device, so that nothing compiles anew for it; and no longer what its name was."""
    leaves = jax.tree.leaves(finished.model.params)
    assert not any(leaf.committed for leaf in leaves)
    named = dataclasses.replace(model, source="gpt2-mini")
    config = dataclasses.replace(CONFIG, steps=1)
    assert finetune(named, texts(), config, progress=False).model.source is None
    adapted = finetune(
        named, texts(), dataclasses.replace(config, lora=LoRAConfig(rank=2)), progress=False
    ).model
    assert adapted.source == "gpt2-mini" and not any(x.committed for x in jax.tree.leaves(adapted.adapters))


@pytest.mark.slow
def test_load_of_a_run_folder(finished):
    again = load(finished.output)
    assert_same(again.params, finished.model.params)
    assert again.source == str(finished.output)
    assert sorted(p.name for p in finished.output.iterdir()) == [
        "checkpoints",
        "metrics.jsonl",
        "model",
        "run.json",
    ]
    assert sorted(int(p.name) for p in (finished.output / "checkpoints").iterdir()) == [8, 12]


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 9])
def test_finetune_interrupted_and_resumed(model, finished, tmp_path, monkeypatch, stop):
    options = {"validation_texts": texts(3), "output": tmp_path / "run", "progress": False}
    batch = trainer.Batches.batch

    def interrupted(self, step):
        if step == stop:
            raise KeyboardInterrupt
        return batch(self, step)

    monkeypatch.setattr(trainer.Batches, "batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finetune(model, texts(), CONFIG, **options)
    monkeypatch.setattr(trainer.Batches, "batch", batch)
    with pytest.raises(ValueError, match="has not ended; resume it"):
        load(tmp_path / "run")
    resumed = finetune(model, texts(), CONFIG, resume=True, **options)
    assert_same(resumed.model.params, finished.model.params)
    assert resumed.history[-1]["validation_loss"] == finished.history[-1]["validation_loss"]


def test_finetune_does_not_resume_with_other_settings(model, finished):
    other = FinetuneConfig(**{**CONFIG.__dict__, "batch_size": 2, "learning_rate": 0.5, "log_every": 1})
    with pytest.raises(
        ValueError, match=r"batch_size was 4, is 2; finetune\.learning_rate was 0\.001, is 0\.5"
    ):
        finetune(model, texts(), other, output=finished.output, resume=True, progress=False)
    with pytest.raises(ValueError, match="data.documents was 30, is 29"):
        finetune(model, texts(29), CONFIG, output=finished.output, resume=True, progress=False)


@pytest.mark.slow
def test_finetune_in_folders_with_content(model, finished, tmp_path):
    with pytest.raises(FileExistsError, match="holds another run"):
        finetune(model, texts(), CONFIG, output=finished.output, progress=False)
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="holds no run"):
        finetune(model, texts(), CONFIG, output=tmp_path, progress=False)
    one = FinetuneConfig(steps=1, batch_size=4, sequence_length=16)
    finetune(model, texts(), one, output=tmp_path / "run", progress=False)
    (tmp_path / "run" / "notes.txt").write_text("precious")
    run = finetune(model, texts(), one, output=tmp_path / "run", overwrite=True, progress=False)
    assert len(run.history) == 1
    assert (tmp_path / "run" / "notes.txt").read_text() == "precious"


@pytest.mark.slow
def test_finetune_with_lora(model, tmp_path):
    config = FinetuneConfig(steps=4, batch_size=4, sequence_length=16, lora=LoRAConfig(rank=2, dropout=0.1))
    run = finetune(model, texts(), config, output=tmp_path / "run", progress=False)
    assert run.model.params is model.params and run.model.lora == config.lora
    again = load(tmp_path / "run")  # the base was made in memory, so the run keeps it
    ids = np.arange(10)[None]
    np.testing.assert_allclose(again.logits(ids), run.model.logits(ids), atol=1e-6)
    merged = "adapters are merged into its weights first; this run trains"
    with pytest.raises(ValueError, match="empty"), pytest.warns(Notice, match=f"{merged} new adapters"):
        finetune(run.model, [], config, progress=False)
    with pytest.raises(ValueError, match="empty"), pytest.warns(Notice, match=f"{merged} all parameters"):
        finetune(run.model, [], progress=False)
    state = tmp_path / "run" / "checkpoints" / "4"
    assert sum(file.stat().st_size for file in state.rglob("*")) < 200_000  # adapters and their moments only


@pytest.mark.slow
def test_finetune_with_64_bits_enabled_is_the_same(model, finished):
    with jax.enable_x64(True):
        run = finetune(model, texts(), CONFIG, validation_texts=texts(3), progress=False)
        loss = evaluate(run.model, texts(3), sequence_length=16).loss
    assert loss == pytest.approx(evaluate(finished.model, texts(3), sequence_length=16).loss, abs=1e-5)
    assert {leaf.dtype for leaf in jax.tree.leaves(run.model.params)} == {np.dtype(np.float32)}
    losses, expected = ([entry["loss"] for entry in result.history] for result in (run, finished))
    np.testing.assert_allclose(losses, expected, atol=1e-5)


@pytest.mark.slow
def test_finetune_stops_at_a_loss_that_is_not_finite(model, tmp_path, monkeypatch):
    make = trainer.make_configured_step

    def make_failing(*args, **options):
        step = make(*args, **options)

        def fail(state, *others):
            state, metrics = step(state, *others)
            return state, metrics | {"loss": jnp.where(state["step"] == 5, jnp.nan, metrics["loss"])}

        return fail

    monkeypatch.setattr(trainer, "make_configured_step", make_failing)
    output = tmp_path / "run"
    for every, where in (
        (1, r"the last good checkpoint is step 3, a model at (.*)"),  # what step 4 left made step 5 fail
        (9, "there is no checkpoint from before"),
    ):
        config = dataclasses.replace(CONFIG, steps=9, checkpoint_every=every)
        with pytest.raises(
            FloatingPointError,
            match=rf"step 5: loss nan.*; its batch, number 4, holds documents \d+, .*; {where}",
        ) as error:
            finetune(model, texts(), config, output=output, overwrite=True, progress=False)
        if every == 1:
            path = str(error.value).rpartition(" ")[2]
            assert load(path).source == path == str(output / "checkpoints" / "3")


@pytest.mark.slow
def test_load_of_checkpoints(model, tmp_path, caplog):
    """Of the average of some of the parameters, and of adapters: what the run gave at that step."""
    model.save(tmp_path / "base")
    base = load(tmp_path / "base")
    ids = np.arange(10)[None]
    some = {"ema_decay": 0.5, "freeze": ("wte", "h.0")}
    kinds = some, {"lora": LoRAConfig(rank=2, targets=("attn.q",))}
    for number, kind in enumerate(kinds):
        config = dataclasses.replace(CONFIG, steps=2, **kind)
        run = finetune(base, texts(), config, output=tmp_path / str(number), progress=False)
        # wherever it lies: it holds all that it needs but the base
        loaded = load(
            shutil.copytree(tmp_path / str(number) / "checkpoints" / "2", tmp_path / f"copy{number}")
        )
        np.testing.assert_array_equal(loaded.logits(ids), run.model.logits(ids))
        assert loaded.source is not None
        assert load(loaded.source, dtype="bfloat16").params["wpe"]["embedding"].dtype == "bfloat16"
    assert not caplog.records and loaded.source is not None
    random_model = dataclasses.replace(model, params=random_params(seed=1))
    random_model.save(tmp_path / "base")
    with pytest.raises(ValueError, match="base is no longer what the run began with"):
        load(loaded.source)
    with pytest.raises(ValueError, match="dtype must be one of float32, .*got 'int4'"):
        load(loaded.source, dtype="int4")


def test_load_and_finetune_name_a_damaged_checkpoint(model, finished, tmp_path):
    run = shutil.copytree(finished.output, tmp_path / "run")
    newest = run / "checkpoints" / "12"
    for file in (newest / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"the checkpoint {newest} can't be read"):
        load(newest)
    with pytest.raises(ValueError, match="step 12 in .* can't be read: .* goes on from the one before"):
        finetune(model, texts(), CONFIG, validation_texts=texts(3), output=run, resume=True, progress=False)
    (newest / "run" / "metadata").write_text("{}")
    with pytest.raises(ValueError, match="metadata is damaged: it has no finetune and no base_model"):
        load(newest)


@pytest.mark.slow
def test_finetune_logs_float16_steps_that_overflow(model, tmp_path, monkeypatch):
    # the first step overflows, and after it the scale is the largest one that is allowed
    monkeypatch.setattr(training_step, "INITIAL_SCALE", 2.0**120)
    monkeypatch.setattr(training_step, "MAX_SCALE", 2.0**10)
    config = FinetuneConfig(
        steps=4, batch_size=4, sequence_length=16, compute_dtype="float16", log_every=1, warmup_steps=2
    )
    run = finetune(model, texts(), config, output=tmp_path / "run", progress=False)
    assert [entry["skipped"] for entry in run.history] == [1, 1, 1, 1]
    assert ["grad_norm" in entry for entry in run.history] == [False, True, True, True]
    # the schedule waits for the step that was skipped
    rates = [entry["learning_rate"] for entry in run.history]
    np.testing.assert_allclose(rates, [1e-3 / 3, 1e-3 / 3, 2e-3 / 3, 1e-3], rtol=1e-6)

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


@pytest.mark.slow
def test_finetune_stops_if_float16_overflows_at_any_scale(model, tmp_path, monkeypatch):
    monkeypatch.setattr(training_step, "INITIAL_SCALE", 4.0)
    broken = dataclasses.replace(model, params=jax.tree.map(lambda x: x * 1e30, model.params))
    config = FinetuneConfig(steps=9, batch_size=4, sequence_length=16, compute_dtype="float16")
    with pytest.raises(
        FloatingPointError,
        match="step 3: .* loss scale too, 1.0; .*; its batch, number 2, holds documents .*; there is no checkpoint",
    ):
        finetune(broken, texts(), config, output=tmp_path / "run", progress=False)
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    last = json.loads(line)  # the way there is in the log
    assert (last["step"], last["loss_scale"], last["skipped"]) == (2, 2.0, 2)


@pytest.mark.slow
def test_finetune_fails_if_every_step_was_skipped(model, tmp_path):
    broken = dataclasses.replace(model, params=jax.tree.map(lambda x: x * 1e30, model.params))
    config = FinetuneConfig(steps=3, batch_size=4, sequence_length=16, compute_dtype="float16")
    for resume in (False, True):  # resumed, it has ended already
        with pytest.raises(
            FloatingPointError, match="all 3 steps were skipped, .* nothing was learned; compute"
        ):
            finetune(broken, texts(), config, output=tmp_path / "run", resume=resume, progress=False)
    assert not (tmp_path / "run" / "model").exists()


LONG_PROMPTS = [{"prompt": [1] * 40, "completion": [2]}]


@pytest.mark.slow
def test_finetune_fails_if_every_token_was_masked_out(model):
    config = FinetuneConfig(
        steps=1, batch_size=4, sequence_length=16
    )  # the end of the only document is not drawn
    with pytest.raises(ValueError, match="all 1 batches held prompts and padding only: nothing was learned"):
        finetune(model, [{"prompt": [1] * 900, "completion": [2]}], config, progress=False)


@pytest.mark.parametrize(
    "rows", [(LONG_PROMPTS, texts(3)), (texts(3), LONG_PROMPTS)], ids=["train", "validation"]
)
def test_finetune_leaves_nothing_if_prompts_fill_the_rows(model, tmp_path, rows):
    config = FinetuneConfig(steps=1, batch_size=4, sequence_length=16, packing="padded")
    with pytest.raises(ValueError, match="all 1 prompts fill their rows of 16 tokens: no completion is left"):
        finetune(model, rows[0], config, validation_texts=rows[1], output=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_train_log_counts_float16_overflows_as_not_finite():
    config = FinetuneConfig(learning_rate=1e-3, compute_dtype="float16")
    log = TrainLog(config, 9, None, 0, [])
    for step, norm, scale in ((1, 2.0, 4), (2, np.inf, 4), (3, 2.0, 2), (4, np.inf, 2), (5, np.nan, 1)):
        metrics = {"loss": 1.0, "accuracy": 0.0, "tokens": 8.0, "grad_norm": norm, "loss_scale": scale}
        log.add(step, {name: jnp.float32(value) for name, value in metrics.items()})
    with pytest.raises(NonFiniteError, match="step 5: ") as error:
        log.fetch()
    assert (error.value.step, error.value.first) == (5, 4)


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([[1], []], {}, "shorter than two tokens"),
        ([], {}, "there are no texts"),
        (
            texts(2),
            {"sequence_length": 33},
            "sequence_length must be at most the model's context of 32 tokens, got 33",
        ),
    ],
)
def test_finetune_leaves_nothing_if_it_cannot_train(model, tmp_path, rows, settings, message):
    config = FinetuneConfig(**{"steps": 1, **settings})
    with pytest.raises(ValueError, match=message):
        finetune(model, rows, config, output=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"model": "gpt2-mini"}, ValueError, "model must be a LanguageModel, got 'gpt2-mini'; gpt2jax.load"),
        ({"train_texts": None}, TypeError, "train_texts must be a list of texts, got None"),
        ({"train_texts": {"text": ["a"]}}, TypeError, "train_texts must be a list of texts, got {'text'"),
        (
            {"validation_texts": "a text"},
            TypeError,
            "validation_texts must be a list of texts, got one string",
        ),
        ({"config": {}}, ValueError, "config must be a FinetuneConfig, or None, got {}"),
        ({"config": LoRAConfig()}, ValueError, r"config must be a FinetuneConfig, or None, got LoRAConfig"),
        ({"source": "docs"}, ValueError, "source must be a dict, or None, got 'docs'"),
        ({"output": ""}, ValueError, "output must be a name or a path, and not empty, got ''"),
        ({"output": 5}, ValueError, "output must be a name or a path, and not empty, got 5"),
    ],
)
def test_finetune_names_misplaced_arguments(model, given, error, message):
    arguments = {"model": model, "train_texts": texts(), "config": CONFIG, "progress": False, **given}
    with pytest.raises(error, match=message):
        finetune(**arguments)


def test_finetune_names_validation_texts_that_are_too_short(model):
    with pytest.raises(ValueError, match="all 2 validation texts are shorter than two tokens"):
        finetune(model, texts(), CONFIG, validation_texts=[[1], [2]], progress=False)


@pytest.mark.slow
def test_finetune_with_strings_and_epochs():
    tokenizer = Tokenizer.gpt2(300)
    from tiny_models import CONFIG as SHAPE

    model = LanguageModel(SHAPE, random_params(SHAPE), tokenizer)
    config = FinetuneConfig(
        epochs=2, batch_size=2, sequence_length=16, packing="padded", compute_dtype="bfloat16"
    )
    run = finetune(model, ["a text", "another one", "a third"], config, progress=False)
    assert run.output is None and run.history[-1]["step"] == 3
