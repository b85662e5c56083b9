"""A run stopped at any place and resumed is the run that never stopped, its log included."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import NO_DROPOUT, random_params

import gpt2jax.train.trainer as trainer
from gpt2jax.language_model import LanguageModel
from gpt2jax.lora.config import LoRAConfig
from gpt2jax.model.config import GPT2Config
from gpt2jax.train.checkpoint import Checkpoints
from gpt2jax.train.config import FinetuneConfig
from gpt2jax.train.finetune import finetune
from gpt2jax.utils.notices import Notice

SHAPE = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=50, n_positions=16, **NO_DROPOUT)
# entries of the log at 4, 5, 8, 10, 11; checkpoints at 3, 6, 9, 11: a checkpoint falls between two entries
CONFIG = FinetuneConfig(
    steps=11, batch_size=2, sequence_length=16, log_every=4, eval_every=5, checkpoint_every=3
)
TIMINGS = ("seconds", "tokens_per_second")
Patch = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel(SHAPE, random_params(SHAPE))


def texts() -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 49, size).tolist() for size in generator.integers(2, 40, 12)]


def train(model: LanguageModel, config: FinetuneConfig, output: Any, **options: Any) -> trainer.Run:
    return finetune(
        model, texts(), config, validation_texts=texts()[:2], output=output, progress=False, **options
    )


def assert_same_run(a: trainer.Run, b: trainer.Run) -> None:
    jax.tree.map(np.testing.assert_array_equal, a.model.params, b.model.params)
    jax.tree.map(np.testing.assert_array_equal, a.model.adapters, b.model.adapters)
    logs = [[{k: v for k, v in e.items() if k not in TIMINGS} for e in run.history] for run in (a, b)]
    assert logs[0] == logs[1]
    assert b.output is not None
    lines = (b.output / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == b.history


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> trainer.Run:
    name = os.fsdecode(b"run[1]*\xff")  # a pattern, and not UTF-8
    return train(model, CONFIG, tmp_path_factory.mktemp("whole") / name)


def at_call(owner: Any, name: str, number: int, *, after: bool) -> Patch:
    """Stops at a call of a function, counted from 1, when it begins or when it has returned."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        original, calls = getattr(owner, name), []

        def stop(*args, **options):
            calls.append(1)
            if len(calls) == number and not after:
                raise KeyboardInterrupt
            result = original(*args, **options)
            if len(calls) == number:
                raise KeyboardInterrupt
            return result

        monkeypatch.setattr(owner, name, stop)

    return patch


def in_step(number: int) -> Patch:
    """Stops when a step has been computed, before its result has a name: the state before it is donated."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        make = trainer.make_configured_step

        def make_stopping(*args, **options):
            step, calls = make(*args, **options), []

            def stop(*arguments):
                result = step(*arguments)
                calls.append(1)
                if len(calls) == number:
                    raise KeyboardInterrupt
                return result

            return stop

        monkeypatch.setattr(trainer, "make_configured_step", make_stopping)

    return patch


@pytest.mark.slow
@pytest.mark.parametrize(
    ("patch", "saved"),
    [
        pytest.param(at_call(trainer.Batches, "batch", 8, after=False), 7, id="between two entries"),
        pytest.param(in_step(8), 6, id="in a step"),
        pytest.param(at_call(trainer, "validation_loss", 2, after=False), 10, id="in a validation"),
        pytest.param(at_call(trainer.RunFolder, "append_metrics", 3, after=True), 8, id="behind an entry"),
        pytest.param(
            at_call(trainer.RunFolder, "finish", 1, after=False), 11, id="before the model is written"
        ),
    ],
)
def test_finetune_stopped_and_resumed_is_the_whole_run(model, whole, tmp_path, patch, saved):
    output = tmp_path / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        patch(monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            train(model, CONFIG, output)
    assert max(int(path.name) for path in (output / "checkpoints").iterdir()) == saved
    assert_same_run(whole, train(model, CONFIG, output, resume=True))


@pytest.mark.slow
def test_finetune_stopped_in_the_first_step_and_resumed(model, whole, tmp_path):
    with pytest.MonkeyPatch.context() as monkeypatch:
        in_step(1)(monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            train(model, CONFIG, tmp_path / "run")
    assert_same_run(whole, train(model, CONFIG, tmp_path / "run", resume=True))


@pytest.mark.slow
def test_finetune_lengthens_a_finished_run(model, tmp_path):
    config = dataclasses.replace(CONFIG, schedule="constant", warmup_steps=2)
    whole = train(model, config, tmp_path / "whole")
    train(model, dataclasses.replace(config, steps=6), tmp_path / "run")
    with pytest.warns(Notice, match="had 6 steps, and goes on to step 11"):
        longer = train(model, config, tmp_path / "run", resume=True)
    jax.tree.map(np.testing.assert_array_equal, whole.model.params, longer.model.params)
    assert [entry["step"] for entry in longer.history] == [4, 5, 6, 8, 10, 11]
    assert longer.history[-1]["validation_loss"] == whole.history[-1]["validation_loss"]
    with pytest.raises(ValueError, match="steps was 11, is 6; .*: --model .*run trains on"):
        train(model, dataclasses.replace(config, steps=6), tmp_path / "run", resume=True)


@pytest.mark.slow
@pytest.mark.thorough
def test_finetune_resumes_everything_that_a_state_may_hold(model, tmp_path):
    """Adapters on a rounded base, dropout, loss scale, parts of batches, bfloat16 moments and an average."""
    lora = LoRAConfig(rank=2, dropout=0.2)
    config = dataclasses.replace(
        CONFIG,
        lora=lora,
        base_dtype="int8",
        dropout=0.1,
        compute_dtype="float16",
        gradient_accumulation_steps=2,
        moments_dtype="bfloat16",
        ema_decay=0.5,
        steps=6,
    )
    whole = train(model, config, tmp_path / "whole")
    assert whole.history[-1]["loss_scale"] > 1 and whole.history[-1]["skipped"] >= 0
    with pytest.MonkeyPatch.context() as monkeypatch:
        at_call(trainer.Batches, "batch", 5, after=False)(monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            train(model, config, tmp_path / "run")
    assert_same_run(whole, train(model, config, tmp_path / "run", resume=True))


@pytest.mark.slow
def test_finetune_resumed_after_its_end_changes_nothing(model, whole):
    before = (whole.output / "metrics.jsonl").read_text()
    again = train(model, CONFIG, whole.output, resume=True)
    assert again.history == whole.history
    assert_same_run(whole, again)
    assert (whole.output / "metrics.jsonl").read_text() == before


@pytest.mark.slow
def test_finetune_writes_no_home_folder_into_the_run(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = dataclasses.replace(CONFIG, keep_best=True, token_cache=str(tmp_path / "cache"))
    model = dataclasses.replace(model, source=str(tmp_path / "model"))
    train(model, config, "~/run", source={"source": str(tmp_path / "texts")})
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 30
    assert not [path for path in files if os.fsencode(tmp_path) in path.read_bytes()]


def test_checkpoints_save_copies_the_pending_metrics(tmp_path):
    """The writing takes place in the background, and the list goes on to be used."""
    checkpoints = Checkpoints(tmp_path)
    state, pending_metrics = {"step": jnp.zeros((), jnp.int32)}, [{"step": 1.0}]
    checkpoints.save(1, state, pending_metrics)
    pending_metrics += [{"step": float(step)} for step in range(2, 50)]
    checkpoints.close()
    assert Checkpoints(tmp_path).restore(state)[1] == [{"step": 1.0}]
