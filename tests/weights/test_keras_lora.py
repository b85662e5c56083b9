"""Adapter files of Keras, as keras-hub lays them out; tests/parity has those that it writes itself."""

from __future__ import annotations

import random
from pathlib import Path

import h5py
import numpy as np
import pytest
from tiny_models import TINY, random_params

from gpt2jax.language_model import LanguageModel
from gpt2jax.loading import load_adapter, save_adapter
from gpt2jax.lora.adapters import merge_adapters
from gpt2jax.utils.notices import Notice

RANK, HEADS, WIDTH = 3, TINY.n_head, TINY.head_dim


@pytest.fixture
def file(tmp_path) -> Path:
    """Query of both blocks, the mlp's second linear of the second block."""
    rng = np.random.default_rng(0)
    attention = ((32, HEADS, RANK), (RANK, WIDTH))
    shapes = {11: attention, 21: attention, 14: ((128, RANK), (RANK, 32))}
    with h5py.File(tmp_path / "a.lora.h5", "w") as h5:
        h5["lora/vars/rank"] = RANK
        for index, pair in shapes.items():
            for letter, shape in zip("ab", pair, strict=True):
                values = rng.normal(size=shape).astype(np.float32)
                h5[f"lora/{index}/vars/lora_kernel_{letter}"] = values
    return tmp_path / "a.lora.h5"


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel(TINY, random_params())


def test_load_keras_lora_merged_kernels(file, model):
    adapted = load_adapter(model, file)
    assert adapted.lora is not None and adapted.adapters is not None
    assert adapted.lora.targets == ("attn.q", "mlp.c_proj") or adapted.lora.targets == (
        "mlp.c_proj",
        "attn.q",
    )
    assert adapted.lora.scale_of(0, "attn.q") == adapted.lora.scale_of(1, "mlp.c_proj") == 1.0
    before, after = model.params["h"], merge_adapters(model.params, adapted.adapters, adapted.lora)["h"]
    with h5py.File(file) as h5:
        for layer, index in enumerate((11, 21)):
            a, b = (np.asarray(h5[f"lora/{index}/vars/lora_kernel_{letter}"]) for letter in "ab")
            kernel = np.array(before["attn"]["c_attn"]["kernel"][layer])
            kernel[:, :32] += np.einsum("dnr,rh->dnh", a, b).reshape(32, 32)
            np.testing.assert_allclose(after["attn"]["c_attn"]["kernel"][layer], kernel, atol=1e-5)
        update = h5["lora/14/vars/lora_kernel_a"][()] @ h5["lora/14/vars/lora_kernel_b"][()]  # pyright: ignore
    change = np.asarray(after["mlp"]["c_proj"]["kernel"] - before["mlp"]["c_proj"]["kernel"])
    np.testing.assert_allclose(change[1], update, atol=1e-5)
    assert not change[0].any()


@pytest.mark.slow
def test_save_adapter_of_keras_lora(file, model, tmp_path):
    adapted = load_adapter(model, file)
    save_adapter(adapted, tmp_path / "peft")
    ids = np.arange(10)[None]
    again = load_adapter(model, tmp_path / "peft")
    np.testing.assert_allclose(again.logits(ids), adapted.logits(ids), atol=2e-5)


def change(h5, name, values=None):
    if name in h5:
        del h5[name]
    if values is not None:
        h5[name] = values


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("lora/vars/rank", None, "no number lora/vars/rank"),
        ("lora/vars/rank", 4, r"lora_kernel_a: has shape \[32, 2, 3\], expected \[32, 2, 4\]"),
        ("lora/11/vars/lora_kernel_b", None, "lora/11/vars/lora_kernel_b: missing"),
        ("lora/12/vars/lora_kernel_a", np.zeros(3), "lora/12/vars/lora_kernel_a: unknown"),
        ("lora/31/vars/lora_kernel_a", np.zeros((32, 2, 3)), "lora/31/vars/lora_kernel_a: unknown"),
        ("lora/11/vars/lora_kernel_b", np.zeros((3, 16), "i4"), "lora_kernel_b: is int32"),
    ],
)
def test_load_keras_lora_refuses_files_that_do_not_fit(file, model, name, values, message):
    with h5py.File(file, "a") as h5:
        change(h5, name, values)
    with pytest.raises(ValueError, match=message) as info:
        load_adapter(model, file)
    assert "a.lora.h5" in str(info.value)


def test_load_keras_lora_names_values_that_are_not_finite(file, model):
    with h5py.File(file, "a") as h5:
        change(h5, "lora/11/vars/lora_kernel_b", np.full((3, 16), np.nan, "f4"))
    with pytest.warns(
        Notice, match="1 of 6 tensors hold values that are not finite .*: lora/11/vars/lora_kernel_b"
    ):
        load_adapter(model, file)


def test_load_keras_lora_cut_short_anywhere(file, model):
    whole = file.read_bytes()
    rng = random.Random(0)
    for length in [0, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(200))]:
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"a\.lora\.h5"):
            load_adapter(model, file)


def test_load_keras_lora_other_files(tmp_path, model):
    with pytest.raises(FileNotFoundError, match="nothing"):
        load_adapter(model, tmp_path / "nothing.lora.h5")
    (tmp_path / "a.lora.h5").write_bytes(b"no such file")
    with pytest.raises(ValueError, match="not an HDF5 file"):
        load_adapter(model, tmp_path / "a.lora.h5")
