"""The same sums from one device and from four."""

from __future__ import annotations

from typing import Any

import pytest
from devices import on_four_devices
from tiny_models import random_model

from gpt2jax.evaluation.evaluate import evaluate
from gpt2jax.ops.device import Device

PROGRAM = """
import json
import jax
from tiny_models import random_model
from gpt2jax.evaluation.evaluate import evaluate

texts = ["", "a", "été and 🙂"] + [f"text {i} " + "word " * i for i in range(20)]
found = []
for windows in ("truncate", "sliding"):
    for devices in (jax.devices()[:1], None):
        result = evaluate(
            random_model(0), texts, sequence_length=16, batch_size=6, windows=windows, devices=devices
        )
        found.append(result.as_dict(per_document=True))
print(json.dumps([jax.device_count(), found]))
"""


@pytest.mark.slow
@pytest.mark.thorough
def test_evaluate_four_devices_give_the_sums_of_one():
    count, results = on_four_devices(PROGRAM)
    assert count == 4
    for one, four in zip(results[::2], results[1::2], strict=True):
        for name in ("loss_sum", "text_loss_sum", "calibration_error"):
            assert four[name] == pytest.approx(one[name], rel=1e-6), name
        assert four["document_loss"] == pytest.approx(one["document_loss"], rel=1e-6)
        for name in ("correct", "correct_top5", "keras_correct", "tokens", "document_correct"):
            assert four[name] == one[name], name


@pytest.mark.slow
def test_evaluate_by_the_programs_of_a_gpu_gives_the_sums_of_a_cpu(monkeypatch):
    """Layers written out and the whole vocabulary at once, run here; rows are split, for so little memory is left."""
    model, texts = random_model(0), [f"text {i} " + "word " * i for i in range(12)]
    settings: dict[str, Any] = {"sequence_length": 16, "batch_size": 6}
    expected = evaluate(model, texts, **settings)
    gpu = Device("cuda", (7, 5), memory_bytes=16 * 4 * 50 * model.config.vocab_size)
    monkeypatch.setattr(Device, "of", lambda device=None: gpu)
    found = evaluate(model, texts, **settings)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    of_documents = [result.as_dict(per_document=True)["document_loss"] for result in (found, expected)]
    assert of_documents[0] == pytest.approx(of_documents[1], rel=1e-6)
    assert (found.accuracy, found.tokens) == (expected.accuracy, expected.tokens)
