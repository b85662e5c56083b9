"""Loading holds the model and at most its largest tensor beside it, whatever the format."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from gpt2jax.model.config import GPT2Config
from gpt2jax.model.gpt2 import abstract_params
from gpt2jax.weights.hf import RULES, save_hf
from gpt2jax.weights.keras import save_keras
from gpt2jax.weights.mapping import file_shapes

# 106 million bytes, of which the embedding has a third
CONFIG = GPT2Config(vocab_size=24_000, n_positions=256, n_embd=384, n_layer=10, n_head=6)
MEASURE = """
import sys, jax, gpt2jax
def resident(field):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))
gpt2jax.load("gpt2-mini")
before = resident("VmRSS:")
params = jax.block_until_ready(gpt2jax.load(sys.argv[1], dtype=sys.argv[2]).params)
print(sum(leaf.nbytes for leaf in jax.tree.leaves(params)), resident("VmHWM:") - before)
"""


@pytest.fixture(scope="module")
def params() -> dict:
    return jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), abstract_params(CONFIG))


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.skipif(
    not Path("/proc/self/status").is_file(), reason="needs Linux to say the memory of a process"
)
@pytest.mark.parametrize(
    ("format", "dtype"),
    [("float32", "float32"), ("float16", "float32"), ("float32", "bfloat16"), ("keras", "float32")],
)
def test_load_peak_memory(tmp_path, params, format, dtype):
    if format == "keras":
        save_keras(tmp_path / "model", CONFIG, params)
    else:
        save_hf(tmp_path / "model", CONFIG, params, dtype=format)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "model"), dtype]
    measured = subprocess.run(command, capture_output=True, text=True, check=True)
    model, peak = map(int, measured.stdout.split())
    sizes = [math.prod(shape) for shape in file_shapes(CONFIG, RULES).values()]
    assert model == (4 if dtype == "float32" else 2) * sum(sizes)
    assert 0.5 * model < peak < model + 4 * max(sizes) + 4_000_000, (model, max(sizes), peak)
