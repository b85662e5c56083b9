"""A saved model that is replaced: at every moment it is the old one or the new one."""

from __future__ import annotations

import os
import pickle

import jax
import numpy as np
import pytest
from killing import kill_at_each_call
from tiny_models import TINY, random_params

KILLED = """
import json, pickle
from gpt2jax.weights.hf import save_hf
from safetensors.numpy import load_file
config, params = pickle.loads(Path({params!r}).read_bytes())

def write(text):
    shifted = {{**params, "wpe": {{"embedding": params["wpe"]["embedding"] + (text == "new")}}}}
    save_hf(target, config, shifted, None, max_shard_bytes=50_000)

def read():
    index = json.loads((target / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert files == {{path.name for path in target.glob("*.safetensors")}}
    tensors = {{name: value for file in files for name, value in load_file(target / file).items()}}
    assert len(tensors) == len(index["weight_map"])
    (name,) = [name for name in tensors if "wpe" in name]
    return "new" if (tensors[name] == params["wpe"]["embedding"] + 1).all() else "old"
"""


@pytest.mark.slow
@pytest.mark.thorough
def test_save_hf_killed_at_each_system_call(tmp_path):
    params = jax.tree.map(np.asarray, random_params())
    file = tmp_path / "params"
    file.write_bytes(pickle.dumps((TINY, params)))
    (tmp_path / "folder").mkdir()
    kills, recovered = kill_at_each_call(KILLED.format(params=os.fspath(file)), tmp_path / "folder")
    assert kills > 20 and recovered == 0
