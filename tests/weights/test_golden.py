"""Files that other libraries wrote, against what those computed; tests/golden/make_*.py made both."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import gpt2jax

GOLDEN = Path(__file__).parent.parent / "golden"
FOLDERS = (
    "hf-tied",
    "hf-untied-float16",
    "hf-relu-bfloat16",
    "keras-nlp",
    "keras-hub",
    "openai",
    "nanogpt-bias",
    "nanogpt-plain",
    "flax-tied",
    "flax-untied",
    "tf",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLDERS)
def test_load_logits_equal_those_of_other_libraries(name):
    model = gpt2jax.load(GOLDEN / name)
    expected = json.loads((GOLDEN / name / "expected.json").read_text())
    logits = np.load(GOLDEN / name / "logits.npy")
    assert np.abs(logits).max() > 0.5
    np.testing.assert_allclose(model.logits(expected["token_ids"]), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FOLDERS if name.startswith("hf")])
def test_load_greedy_continuation_equals_transformers(name):
    model = gpt2jax.load(GOLDEN / name)
    expected = json.loads((GOLDEN / name / "expected.json").read_text())
    # greedy decoding in one forward pass: each of the 40 tokens is the most likely one after all before it
    text = np.asarray([expected["greedy"]])
    assert text.shape[1] == 8 + 40
    np.testing.assert_array_equal(np.argmax(model.logits(text)[0, 7:-1], axis=-1), text[0, 8:])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "folder", "file"),
    [("hf-tied", "peft", ""), ("hf-tied", "peft-dora", ""), ("keras-hub", "keras-lora", "adapter.lora.h5")],
)
def test_load_adapter_logits_equal_those_of_other_libraries(base, folder, file):
    base = gpt2jax.load(GOLDEN / base)
    model = gpt2jax.load_adapter(base, GOLDEN / folder / file)
    token_ids = json.loads((GOLDEN / folder / "expected.json").read_text())["token_ids"]
    logits = np.load(GOLDEN / folder / "logits.npy")
    assert np.abs(logits - base.logits(token_ids)).max() > 0.1
    np.testing.assert_allclose(model.logits(token_ids), logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model.merge_adapter().logits(token_ids), logits, rtol=2e-5, atol=2e-5)
