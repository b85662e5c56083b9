"""Long evaluations: constant memory, a state file, and the same figures after a kill as without one."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
from killing import kill_at_each_call

import gpt2jax.evaluation.evaluate as module
from gpt2jax.evaluation.accumulators import Breakdown, DocumentSums
from gpt2jax.evaluation.evaluate import evaluate
from gpt2jax.evaluation.resume import State, read_state, write_state
from gpt2jax.utils.notices import Notice

LENGTH = 16
TEXTS = [f"document number {i}, of {i % 7} or more " + "words " * (i % 11) for i in range(100)]

PROGRAM = """
import json, sys, time
sys.path.insert(0, {tests!r})
from tiny_models import random_model
import gpt2jax.evaluation.evaluate as module
from gpt2jax.evaluation.evaluate import evaluate
from test_evaluation_resume import LENGTH, TEXTS

module.CHUNK_SIZE = 16

def texts():
    for index, text in enumerate(TEXTS):
        if index == 70:  # in the middle of a chunk
            print("killable", flush=True)
            time.sleep(60)
        yield text

evaluate(random_model(0), texts(), sequence_length=LENGTH, batch_size=8, state={state!r})
"""


def figures(result) -> str:
    return json.dumps(result.as_dict(per_document=True), sort_keys=True)


@pytest.mark.slow
def test_evaluate_resumed_after_a_kill_gives_the_same_to_the_last_digit(model, tmp_path, monkeypatch):
    state = tmp_path / "state.npz"
    tests = str(pathlib.Path(__file__).parents[1])
    program = PROGRAM.format(tests=tests, state=str(state))
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parent)}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"killable\n"
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    monkeypatch.setattr(module, "CHUNK_SIZE", 16)
    scored = []
    score_chunk: Any = module._score_chunk

    def counted(model, texts, *others, **named):
        scored.append(len(texts))
        return score_chunk(model, texts, *others, **named)

    monkeypatch.setattr(module, "_score_chunk", counted)
    settings: dict[str, Any] = {"sequence_length": LENGTH, "batch_size": 8}
    resumed = evaluate(model, iter(TEXTS), **settings, state=state, resume=True)
    assert scored == [16, 16, 4]  # 64 were done
    whole = evaluate(model, TEXTS, **settings)
    assert figures(resumed) == figures(whole) and resumed.data_sha256 == whole.data_sha256
    np.testing.assert_array_equal(resumed.breakdown.vocabulary_loss, whole.breakdown.vocabulary_loss)
    assert resumed.seconds > 0
    scored.clear()
    again = evaluate(model, TEXTS, **settings, state=state, resume=True)
    assert scored == [] and figures(again) == figures(whole)


@pytest.mark.slow
def test_evaluate_chunks_change_no_figure(model, monkeypatch):
    whole = evaluate(model, TEXTS, sequence_length=LENGTH, batch_size=8, per_token=True)
    monkeypatch.setattr(module, "CHUNK_SIZE", 16)
    chunks = evaluate(model, iter(TEXTS), sequence_length=LENGTH, batch_size=8, per_token=True)
    assert whole.per_token is not None and chunks.per_token is not None
    for name, values in vars(whole.per_token).items():
        np.testing.assert_allclose(getattr(chunks.per_token, name), values, rtol=1e-5)
    assert chunks.loss == pytest.approx(whole.loss, rel=1e-6)
    assert chunks.keras_accuracy == whole.keras_accuracy and chunks.tokens == whole.tokens


@pytest.mark.slow
@pytest.mark.thorough
def test_evaluate_memory_does_not_grow_with_the_texts(model, monkeypatch):
    """100,000 documents: what is held is a few numbers a document, and the texts are never together."""
    alive, most, rows = 0, 0, 100_000

    class Text(list):
        def __init__(self, ids):
            nonlocal alive, most
            super().__init__(ids)
            alive += 1
            most = max(most, alive)

        def __del__(self):
            nonlocal alive
            alive -= 1

    class Scorer:
        num_devices = 1

        def __init__(self, model, compute_dtype, devices):
            pass

        def __call__(self, batch):
            loss = np.ones(batch["tokens"].shape, np.float32)
            return loss, batch["targets"], loss

    monkeypatch.setattr(module, "Scorer", Scorer)  # the device would take minutes
    texts = (Text([i % 290, 5, 7]) for i in range(rows))
    began = time.perf_counter()
    result = evaluate(model, texts, sequence_length=4, batch_size=512)
    assert result.documents == rows and result.tokens == 4 * rows and result.loss == 1.0
    assert most <= 2 * module.CHUNK_SIZE and result.per_token is None
    held = sum(value.nbytes for value in vars(result.per_document).values())
    assert held <= 80 * rows
    assert time.perf_counter() - began < 60


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequence_length": 8}, "its sequence_length is 16, not 8"),
        ({"windows": "non_overlapping"}, "its windows is 'truncate', not 'non_overlapping'"),
        ({"texts": ["other", *TEXTS[1:4]]}, "the state file belongs to 4 other texts"),
        ({"texts": TEXTS[:3]}, "the state file belongs to 4 other texts than the first 3"),
        ({"model": 1}, "its model is "),
    ],
)
def test_evaluate_refuses_a_state_of_something_else(model, other_model, tmp_path, change, message):
    state = tmp_path / "state.npz"
    evaluate(model, TEXTS[:4], sequence_length=LENGTH, state=state)
    chosen = other_model if change.pop("model", 0) else model
    texts = change.pop("texts", TEXTS[:4])
    with pytest.raises(ValueError, match=message):
        evaluate(chosen, texts, **{"sequence_length": LENGTH, **change}, state=state, resume=True)


@pytest.mark.filterwarnings("ignore:.*has no checksum")
def test_read_state_refuses_other_files_and_versions(tmp_path):
    state = tmp_path / "state.npz"
    for content in (b"", b"PK\x03\x04 no", b"x" * 100):
        state.write_bytes(content)
        with pytest.raises(ValueError, match="is not the state of an evaluation, or it is damaged"):
            read_state(state, {})
    np.savez(state, about=np.array(json.dumps({"state_version": 1})))
    with pytest.raises(ValueError, match="must have state version 2, got 1; .* start it anew"):
        read_state(state, {})
    np.savez_compressed(state, about=np.zeros(1 << 16))
    with pytest.raises(ValueError, match="it is compressed"):
        read_state(state, {})


def small_state(path: pathlib.Path, data_sha256: str = "abc") -> bytes:
    def zeros(kind: type, size: int) -> Any:
        return kind(**{field.name: np.zeros(size) for field in dataclasses.fields(kind)})

    write_state(path, State(zeros(DocumentSums, 3), zeros(Breakdown, 2), data_sha256, 7, 1.5), {"model": "x"})
    return path.read_bytes()


def test_read_state_tells_flipped_bits(tmp_path):
    path = tmp_path / "state.npz"
    content = small_state(path)
    assert read_state(path, {"model": "x"}).longest == 7
    mark = len(content) - 16
    for at in [*range(0, mark, 29), *range(len(content) - 8, len(content))]:
        changed = bytearray(content)
        changed[at] ^= 1 << at % 8
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="state.npz is not the state of an evaluation, or it is damaged"):
            read_state(path, {"model": "x"})
    path.write_bytes(content[:mark] + content[mark + 16 :])  # as an older version wrote it
    with pytest.warns(Notice, match="state.npz has no checksum"):
        assert read_state(path, {"model": "x"}).longest == 7


KILLED = """
import numpy as np
sys.path[:0] = {paths!r}
from test_evaluation_resume import read_state, small_state

def write(text):
    small_state(target, text)

def read():
    return read_state(target, {{"model": "x"}}).data_sha256
"""


@pytest.mark.slow
def test_write_state_killed_at_each_system_call(tmp_path):
    here = os.path.dirname(__file__)
    kills, recovered = kill_at_each_call(KILLED.format(paths=[here, os.path.dirname(here)]), tmp_path)
    assert kills > 10 and recovered == 0


@pytest.mark.filterwarnings("ignore:.*has no checksum")
def test_read_state_refuses_states_of_another_form(tmp_path):
    path = tmp_path / "state.npz"
    small_state(path)
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    about = json.loads(str(arrays["about"]))
    changes: list[tuple[str, Any]] = [
        ("per_document.loss", None),
        ("per_document.loss", np.zeros(4)),
        ("breakdown.bin_tokens", np.zeros((2, 2))),
        ("breakdown.bin_tokens", np.array(["a", "b"])),
        ("about", np.array(json.dumps([]))),
        ("about", np.array(json.dumps({"state_version": 2}))),
        ("about", np.array(json.dumps(about | {"identity": 5}))),
        ("about", np.array(json.dumps(about | {"longest": None}))),
        ("about", np.array("[" * 5000)),
    ]
    for name, value in changes:
        others: dict[str, Any] = {key: array for key, array in arrays.items() if key != name}
        np.savez(path, **(others if value is None else others | {name: value}))
        with pytest.raises(ValueError, match="state.npz is not the state of an evaluation, or it is damaged"):
            read_state(path, {"model": "x"})


def test_evaluate_refuses_a_state_that_it_cannot_use(model, tmp_path):
    with pytest.raises(ValueError, match="per_token must be False with a state file"):
        evaluate(model, TEXTS, sequence_length=LENGTH, state=tmp_path / "state.npz", per_token=True)
    with pytest.raises(ValueError, match="resume must be False without a state file"):
        evaluate(model, TEXTS, sequence_length=LENGTH, resume=True)
