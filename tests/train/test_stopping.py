"""What ends a run before its last step, what is kept then, and killing it at any moment."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from test_resume import CONFIG, SHAPE, TIMINGS, assert_same_run, texts, train
from tiny_models import random_params

import gpt2jax.train.trainer as trainer
from gpt2jax.language_model import LanguageModel
from gpt2jax.train.config import FinetuneConfig
from gpt2jax.train.finetune import finetune
from gpt2jax.train.stopping import Interrupted, StopController


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel(SHAPE, random_params(SHAPE))


def validations(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
    """Lets the validations give these losses, one after the other."""
    given = iter(losses)
    monkeypatch.setattr(trainer, "validation_loss", lambda *_, **__: {"validation_loss": next(given)})


def parameters_at(model: LanguageModel, steps: int) -> trainer.Run:
    """A run of so many steps with a rate that does not depend on their number."""
    return finetune(model, texts(), dataclasses.replace(EARLY, steps=steps, patience=None), progress=False)


EARLY = dataclasses.replace(CONFIG, schedule="constant", eval_every=2, log_every=2, steps=11, patience=2)


@pytest.mark.slow
@pytest.mark.parametrize("folder", [True, False])
def test_finetune_early_stopping_returns_the_best(model, tmp_path, monkeypatch, folder):
    validations(monkeypatch, [3.0, 2.0, 2.5, 2.0, 1.0])
    output = tmp_path / "run" if folder else None
    run = train(model, EARLY, output)
    assert [entry["step"] for entry in run.history] == [2, 4, 6, 8]  # the two behind step 4 are no better
    jax.tree.map(np.testing.assert_array_equal, run.model.params, parameters_at(model, 4).model.params)
    if folder:
        assert {path.name for path in (tmp_path / "run" / "best").iterdir()} == {"4"}
        assert_same_run(run, train(model, EARLY, output, resume=True))  # it has ended already


@pytest.mark.slow
def test_finetune_keeps_the_best_of_a_stopped_and_resumed_run(model, tmp_path, monkeypatch):
    """Stopped behind a best validation that no checkpoint has seen."""
    config = dataclasses.replace(EARLY, patience=None, keep_best=True)
    losses = [3.0, 2.0, 2.5, 1.5, 1.7, 1.9]
    validations(monkeypatch, losses)
    whole = train(model, config, tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, whole.model.params, parameters_at(model, 8).model.params)
    validations(monkeypatch, losses)
    with monkeypatch.context() as context:
        flush = trainer.TrainLog.flush

        def killed(self, extra):
            if self.step == 8:
                os.kill(os.getpid(), signal.SIGTERM)
                raise MemoryError  # no chance to save
            return flush(self, extra)

        context.setattr(trainer.TrainLog, "flush", killed)
        with pytest.raises(MemoryError):
            train(model, config, tmp_path / "run")
    validations(monkeypatch, losses[3:])
    assert_same_run(whole, train(model, config, tmp_path / "run", resume=True))


@pytest.mark.slow
def test_finetune_keep_best_needs_a_validation(model):
    with pytest.raises(ValueError, match="keep_best and patience need a validation loss"):
        finetune(model, texts(), EARLY, progress=False)


@pytest.mark.slow
def test_finetune_time_limit(model, tmp_path):
    config = dataclasses.replace(CONFIG, max_minutes=1e-9)
    run = train(model, config, tmp_path / "run")
    assert run.history[-1]["step"] == 1 and "validation_loss" in run.history[-1]
    assert (tmp_path / "run" / "model").is_dir()
    longer = dataclasses.replace(config, max_minutes=60.0)
    whole = train(model, CONFIG, tmp_path / "whole")
    resumed = train(model, longer, tmp_path / "run", resume=True)
    jax.tree.map(np.testing.assert_array_equal, resumed.model.params, whole.model.params)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_finetune_saves_before_a_signal_stops_it(model, tmp_path, monkeypatch, number):
    before = signal.getsignal(number)
    with monkeypatch.context() as context:
        batch = trainer.Batches.batch

        def send(self, step):
            if step == 6:
                os.kill(os.getpid(), number)
            return batch(self, step)

        context.setattr(trainer.Batches, "batch", send)
        with pytest.raises(
            Interrupted, match="step 7 is saved in .*run; resume=True .--resume. goes on"
        ) as caught:
            train(model, CONFIG, tmp_path / "run")
    assert caught.value.signal == number and signal.getsignal(number) == before
    whole = train(model, CONFIG, tmp_path / "whole")
    assert_same_run(whole, train(model, CONFIG, tmp_path / "run", resume=True))


@pytest.mark.slow
def test_finetune_without_a_folder_gives_the_run_so_far_at_a_signal(model, monkeypatch):
    with monkeypatch.context() as context:
        batch = trainer.Batches.batch

        def send(self, step):
            if step == 6:
                os.kill(os.getpid(), signal.SIGINT)
            return batch(self, step)

        context.setattr(trainer.Batches, "batch", send)
        with pytest.raises(Interrupted, match="its model is in this exception's `run`") as caught:
            finetune(model, texts(), dataclasses.replace(EARLY, patience=None), progress=False)
    run = caught.value.run
    assert run.output is None and [entry["step"] for entry in run.history] == [2, 4, 6]
    jax.tree.map(np.testing.assert_array_equal, run.model.params, parameters_at(model, 7).model.params)


def test_stop_controller_second_signal_acts_at_once():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a job in the background
    with StopController(CONFIG, []) as controller:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)  # the first one waits for the end of the step
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        with pytest.raises(Interrupted, match="stopped by SIGINT"):
            controller.raise_if_signalled()
    signal.signal(signal.SIGINT, before)


def test_stop_controller_leaves_signals_alone_in_other_threads():
    before = signal.getsignal(signal.SIGTERM)

    def check():
        with StopController(CONFIG, []):
            assert signal.getsignal(signal.SIGTERM) == before

    thread = threading.Thread(target=check)
    thread.start()
    thread.join()


# each takes 2 s of a processor; .ci/run makes more of them on the newest Python
KILLS = int(os.environ.get("GPT2JAX_TEST_KILLS", "5"))

# A parent that never computes, so that it can fork, and children that train from where the last one was killed: `KILLS`
# are killed, one comes to the end, and one trains the whole run elsewhere.
SCRIPT = """
import dataclasses, os, pickle, random, signal, sys, time
sys.path[:0] = {paths!r}
import jax, optax, orbax.checkpoint, numpy
from test_stopping import KILLED, KILLS, LanguageModel, SHAPE, finetune, texts
folder = {folder!r}
model = LanguageModel(SHAPE, pickle.load(open(folder + "/params", "rb")))
generator, died, saving = random.Random(0), 0, 0
for attempt in range(KILLS + 2):
    ready, started = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            import gpt2jax.train.trainer as trainer
            batch = trainer.Batches.batch
            def told(self, step):
                os.write(started, b"x")
                time.sleep(0.02 if attempt < KILLS else 0)
                return batch(self, step)
            trainer.Batches.batch = told
            output, every = (folder + "/run", 1) if attempt <= KILLS else (folder + "/whole", KILLED.steps)
            config = dataclasses.replace(KILLED, checkpoint_every=every)
            finetune(model, texts(), config, validation_texts=texts()[:2], output=output, progress=False, resume=True)
            os._exit(0)
        except BaseException as error:
            print("child", attempt, repr(error), flush=True)
            os._exit(1)
    os.close(started)
    if attempt < KILLS:
        # from the second batch on it computes, logs and saves; before that it compiles
        for _ in range(1 if attempt % 5 == 4 else 2):
            os.read(ready, 1)
        time.sleep(generator.uniform(0, 0.08))
        os.kill(child, signal.SIGKILL)
    killed = os.waitpid(child, 0)[1] == signal.SIGKILL
    died += killed
    saving += killed and any("tmp" in name for name in os.listdir(folder + "/run/checkpoints"))
    os.close(ready)
print("died", died, saving)
"""

KILLED = FinetuneConfig(
    steps=60, batch_size=2, sequence_length=16, log_every=7, eval_every=25, keep_best=True
)


@pytest.mark.slow
@pytest.mark.thorough
def test_finetune_killed_at_random_moments_and_resumed(model, tmp_path):
    """kill -9 while it compiles, computes, logs, and saves after every step."""
    here = os.path.dirname(__file__)
    script = SCRIPT.format(paths=[here, os.path.dirname(here), os.getcwd()], folder=str(tmp_path))
    (tmp_path / "params").write_bytes(pickle.dumps(jax.device_get(model.params)))
    # of its own: what is killed may leave half a file there
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, **cache},
    )
    assert done.returncode == 0 and "child" not in done.stdout, done.stdout + done.stderr[-2000:]
    died, saving = map(int, done.stdout.split()[-2:])
    assert died >= 0.6 * KILLS, done.stdout  # a few may have come to their end before
    if KILLS >= 10:  # of fewer none might fall into a save
        assert saving >= 0.1 * KILLS, done.stdout
    logs = []
    for name in ("run", "whole"):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        logs.append([{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines])
    assert logs[0] == logs[1] and logs[0][-1]["step"] == KILLED.steps
    files = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("run", "whole")]
    assert files[0] == files[1]
    # of what was killed in a save nothing is left
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"59", "60"}
