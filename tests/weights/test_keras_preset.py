from __future__ import annotations

import dataclasses
import resource
from pathlib import Path

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2jax.model.config import GPT2Config
from gpt2jax.model.gpt2 import abstract_params
from gpt2jax.tokenizer.bpe import Tokenizer
from gpt2jax.weights.formats import load_weights
from gpt2jax.weights.h5_writer import write_h5
from gpt2jax.weights.keras import save_keras

GOLDEN = Path(__file__).parent.parent / "golden"
TINY = GPT2Config(vocab_size=300, n_positions=16, n_embd=24, n_layer=3, n_head=2, n_inner=40)


@pytest.fixture
def params() -> dict:
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), "float32"), abstract_params(TINY)
    )


def test_save_keras_round_trip_is_exact(tmp_path, params):
    tokenizer = Tokenizer.gpt2(300)
    save_keras(tmp_path / "preset", TINY, params, tokenizer)
    config, loaded, read = load_weights(tmp_path / "preset")
    assert config == dataclasses.replace(TINY, bos_token_id=None, eos_token_id=None)  # the tokenizer names it
    assert read is not None and read.fingerprint == tokenizer.fingerprint
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    for ours, theirs in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_save_keras_writes_the_datasets_of_keras_hub(tmp_path):
    config, params, _ = load_weights(GOLDEN / "keras-hub")
    save_keras(tmp_path / "ours", config, params)
    contents = []
    for folder in (GOLDEN / "keras-hub", tmp_path / "ours"):
        datasets: dict[str, np.ndarray] = {}

        def note(name, item, datasets=datasets):
            if isinstance(item, h5py.Dataset):
                datasets[name] = item[()]

        with h5py.File(folder / "model.weights.h5") as file:
            file.visititems(note)
        contents.append(datasets)
    theirs, ours = contents
    assert set(theirs) == set(ours) and len(ours) > 30
    for name, values in theirs.items():
        assert ours[name].dtype == values.dtype
        np.testing.assert_array_equal(ours[name], values)


@pytest.mark.parametrize(
    "changes",
    [
        {"activation_function": "relu"},
        {"layer_norm_epsilon": 1e-6},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"tie_word_embeddings": False},
        {"attn_pdrop": 0.2},
    ],
)
def test_save_keras_refuses_unsupported_settings(tmp_path, params, changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        save_keras(tmp_path / "preset", dataclasses.replace(TINY, **changes), params)
    assert not list(tmp_path.iterdir())


def test_save_keras_replaces_only_a_preset(tmp_path, params):
    for _ in range(2):
        save_keras(tmp_path / "preset", TINY, params, Tokenizer.gpt2(300))
    (tmp_path / "preset" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        save_keras(tmp_path / "preset", TINY, params)


@pytest.mark.parametrize("size", [100, 5000, 40_000])
def test_write_h5_on_a_full_disk_is_an_error(tmp_path, size):
    """HDF5 alone ended the process; a limit on the size of files fails as a full disk does."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_h5(tmp_path / "a.h5", [(f"layers/{i}/kernel", np.ones(1000, np.float32)) for i in range(9)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
