"""The library under jax's switches: the same results whatever a user has switched on for code of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from tiny_models import random_model

import gpt2jax
from gpt2jax.utils import jax_switches
from gpt2jax.utils.jax_switches import default_switches

SWITCHES = {
    "jax_numpy_rank_promotion": "raise",
    "jax_numpy_dtype_promotion": "strict",
    "jax_transfer_guard": "disallow",
    "jax_enable_x64": True,
}
TEXTS = ["a text of some words", "another one"]


@pytest.fixture(scope="module")
def model():
    return random_model(0)


def results(model, folder) -> list:
    """What the public calls return, on few programs."""
    config = gpt2jax.FinetuneConfig(steps=1, batch_size=2, sequence_length=16, dropout=0.0)
    model.save(folder / "model")
    loaded = gpt2jax.load(folder / "model")
    run = gpt2jax.finetune(
        loaded, TEXTS, config, validation_texts=TEXTS, output=folder / "run", progress=False
    )
    evaluation = gpt2jax.evaluate(run.model, TEXTS, sequence_length=16, batch_size=2)
    stream = gpt2jax.stream(run.model, TEXTS[0], max_new_tokens=4, seed=1, top_k=5, repetition_penalty=1.2)
    text = "".join(stream)
    logits = model.logits(np.ones((1, 4), np.int32))
    return [evaluation.loss, text, *jax.device_get([logits, *jax.tree.leaves(run.model.params)])]


@pytest.fixture(scope="module")
def right(model, tmp_path_factory):
    return results(model, tmp_path_factory.mktemp("right"))


@pytest.fixture
def switch():
    """Sets a switch as a user does, and sets it back."""
    before = {}

    def update(name, value):
        before.setdefault(name, getattr(jax.config, name))
        jax.config.update(name, value)

    yield update
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.slow
@pytest.mark.parametrize("names", [[name] for name in SWITCHES] + [list(SWITCHES)], ids=",".join)
def test_public_calls_give_the_same_under_switches(model, right, switch, tmp_path, names):
    for name in names:
        switch(name, SWITCHES[name])
    found = results(model, tmp_path)
    for name in names:
        assert getattr(jax.config, name) == SWITCHES[name]
    for ours, theirs in zip(found, right, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_public_calls_compute_no_nan(model, switch, tmp_path):
    switch("jax_debug_nans", True)
    results(model, tmp_path)


def test_default_switches_end_with_the_block(switch):
    for name, value in SWITCHES.items():
        switch(name, value)
    with default_switches():
        inside = {name: getattr(jax.config, name) for name in SWITCHES}
        total = jax.numpy.ones((2, 3)) + np.ones(3, np.int32)  # which the switches refuse
    assert total.dtype == np.float32 and inside == dict(
        zip(SWITCHES, ("allow", "standard", "allow", False), strict=True)
    )
    assert {name: getattr(jax.config, name) for name in SWITCHES} == SWITCHES


def test_default_switches_leave_the_defaults_alone():
    """A call under defaults must not compile anew."""
    calls = []
    double = jax.jit(lambda x: calls.append(1) or 2 * x)
    double(1)
    with default_switches():
        double(1)
    assert len(calls) == 1


def test_public_calls_say_why_they_cannot_run_after_a_fork(model, monkeypatch):
    parent = os.getpid()
    monkeypatch.setattr(jax_switches, "_owner", parent)
    monkeypatch.setattr(os, "getpid", lambda: parent + 1)
    for call in (
        lambda: gpt2jax.generate(model, "a"),
        lambda: model.logits([[1]]),
        lambda: gpt2jax.load("gpt2-mini"),
    ):
        with pytest.raises(
            RuntimeError, match=f"was forked from process {parent}, which had used jax.*spawn"
        ):
            call()


@pytest.mark.slow
def test_generate_command_works_without_utf8(tmp_path):
    """The C locale, with what Python does against it switched off."""
    random_model(0).save(tmp_path / "model")
    variables = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "GPT2JAX_CACHE": str(tmp_path)}
    (tmp_path / "prompts.txt").write_text("été 東京\n", encoding="utf-8")
    command = ["generate", "--file", "prompts.txt", "--model", "model", "--max-new-tokens", "4"]
    done = subprocess.run(
        [sys.executable, "-m", "gpt2jax", *command],
        env=os.environ | variables,
        cwd=tmp_path,
        capture_output=True,
    )
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    assert done.stdout.startswith(rb"\xe9t\xe9 \u6771\u4eac")
