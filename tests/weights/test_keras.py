from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path

import h5py
import jax
import numpy as np
import pytest

from gpt2jax.weights.formats import load_weights
from gpt2jax.weights.keras import load_keras, load_keras_checkpoint

GOLDEN = Path(__file__).parent.parent / "golden"
WHOLE = GOLDEN / "keras-nlp" / "whole.weights.h5"


def same(params, others) -> bool:
    leaves = zip(jax.tree.leaves(params), jax.tree.leaves(others), strict=True)
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in leaves)


@pytest.fixture
def preset(tmp_path) -> Path:
    shutil.copytree(GOLDEN / "keras-hub", tmp_path / "preset")
    return tmp_path / "preset"


def test_load_weights_all_keras_formats_agree():
    """keras-nlp wrote its h5 file and its checkpoint from one model; keras-hub was given the same numbers."""
    config, params, tokenizer = load_weights(WHOLE)
    assert tokenizer is None
    assert (config.vocab_size, config.n_positions, config.n_layer, config.n_head) == (97, 32, 2, 2)
    assert config.n_inner is None and config.eos_token_id is None and config.embd_pdrop == 0.1
    for path in ("keras-nlp", "keras-nlp/cp.ckpt", "keras-nlp/cp.ckpt.index"):
        other_config, other, _ = load_weights(GOLDEN / path)
        assert other_config == config and same(other, params)
    preset_config, other, _ = load_weights(GOLDEN / "keras-hub")
    assert preset_config == dataclasses.replace(config, embd_pdrop=0.2, attn_pdrop=0.2, resid_pdrop=0.2)
    assert same(other, params)
    assert same(load_weights(GOLDEN / "openai")[1], params)


def move(path: Path, target: Path, rename) -> Path:
    """A copy of an h5 file with its datasets renamed (None leaves one out)."""
    with h5py.File(path) as source, h5py.File(target, "w") as copy:

        def visit(name, item):
            if isinstance(item, h5py.Dataset) and rename(name):
                copy[rename(name)] = item[()]

        source.visititems(visit)
    return target


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.replace("_query_dense", "query_dense").replace("_key_dense", "key_dense"),
        lambda name: name.replace("layers/gpt2_backbone/layers", "layers"),
        lambda name: name.replace("layers/", "_layer_checkpoint_dependencies/"),
        lambda name: name.replace("layers/gpt2_backbone/layers/", ""),
    ],
)
def test_load_keras_layouts_of_other_versions(tmp_path, rename):
    assert same(load_keras(move(WHOLE, tmp_path / "a.weights.h5", rename))[1], load_keras(WHOLE)[1])


def test_load_keras_skips_states(tmp_path):
    path = tmp_path / "a.weights.h5"
    shutil.copy(WHOLE, path)
    with h5py.File(path, "a") as file:
        file["optimizer/vars/5"] = np.zeros(3)
        file["metrics/mean/vars/0"] = np.zeros(())
        file["layers/gpt2_backbone/layers/dropout/seed_generator/vars/0"] = np.zeros(2, np.uint32)
    assert same(load_keras(path)[1], load_keras(WHOLE)[1])


def test_load_keras_bfloat16(tmp_path):
    path = tmp_path / "a.weights.h5"
    shutil.copy(WHOLE, path)
    expected = np.asarray(load_keras(WHOLE)[1]["wpe"]["embedding"].astype("bfloat16"))
    name = "layers/gpt2_backbone/layers/position_embedding/vars/0"
    with h5py.File(path, "a") as file:
        del file[name]
        file[name] = expected.view("V2")  # as Keras does
        file[name].attrs["dtype"] = "bfloat16"
    np.testing.assert_array_equal(load_keras(path)[1]["wpe"]["embedding"], expected.astype(np.float32))


def test_load_keras_names_all_problems(tmp_path):
    path = tmp_path / "a.weights.h5"
    shutil.copy(WHOLE, path)
    root = "layers/gpt2_backbone/layers"
    with h5py.File(path, "a") as file:
        del file[f"{root}/layer_normalization/vars/0"]
        del file[f"{root}/transformer_decoder_1/_self_attention_layer/_key_dense/vars/1"]
        file[f"{root}/transformer_decoder_1/_self_attention_layer/_key_dense/vars/1"] = np.zeros(
            (2, 7), np.float32
        )
        file[f"{root}/dense/vars/0"] = np.zeros((4, 4), np.float32)
    with pytest.raises(ValueError, match=r"a\.weights\.h5") as info:
        load_keras(path)
    for problem in (
        "final_norm/gamma: missing, expected [16]",
        "block_1/key/bias: has shape [2, 7], expected [2, 8]",
        f"{root}/dense/vars/0: unknown, [4, 4]",
    ):
        assert problem in str(info.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 4}, "num_heads must be 2 as in the weights, got 4"),
        ({"vocabulary_size": None}, "vocabulary_size must be 97 as in the weights, got None"),
    ],
)
def test_load_keras_config_of_another_model(preset, changes, message):
    path = preset / "config.json"
    content = json.loads(path.read_text())
    content["config"].update(changes)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"config.json: {message}"):
        load_keras(preset)
    content["class_name"] = "BertBackbone"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="BertBackbone"):
        load_keras(preset)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        load_keras(preset)


def test_read_h5_refuses_links(tmp_path):
    for number, link in enumerate((h5py.ExternalLink("/etc/passwd", "/"), h5py.SoftLink("/"))):
        path = tmp_path / f"{number}.weights.h5"
        with h5py.File(path, "w") as file:
            file["layers"] = link
        with pytest.raises(ValueError, match=r"weights\.h5.*link"):
            load_keras(path)


def test_read_h5_refuses_numbers_outside_the_file(tmp_path):
    path = tmp_path / "a.weights.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("layers/reversible_embedding/vars/0", (10**9, 10**6), "f4", fillvalue=1)
    with pytest.raises(ValueError, match="reversible_embedding"):
        load_keras(path)
    with h5py.File(path, "w") as file:
        file.create_dataset(
            "layers/reversible_embedding/vars/0", data=np.zeros((500, 500)), compression="gzip"
        )
    with pytest.raises(ValueError, match="compressed"):
        load_keras(path)


def test_read_h5_cut_short_anywhere(tmp_path):
    whole = WHOLE.read_bytes()
    path = tmp_path / "a.weights.h5"
    rng = random.Random(0)
    for length in [0, 1, 8, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(200))]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"a\.weights\.h5"):
            load_keras(path)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    for file in (GOLDEN / "keras-nlp").glob("cp.ckpt.*"):
        shutil.copy(file, tmp_path)
    return tmp_path / "cp.ckpt"


def test_load_keras_checkpoint_cut_short_anywhere(checkpoint):
    for file in sorted(checkpoint.parent.iterdir()):
        whole = file.read_bytes()
        rng = random.Random(0)
        for length in [0, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(100))]:
            file.write_bytes(whole[:length])
            with pytest.raises(ValueError, match=r"cp\.ckpt"):
                load_keras_checkpoint(checkpoint)
        file.write_bytes(whole)


@pytest.mark.slow
@pytest.mark.thorough
def test_load_keras_checkpoint_notices_every_flipped_bit(checkpoint):
    expected = load_keras_checkpoint(checkpoint)[1]
    for file in sorted(checkpoint.parent.iterdir()):
        whole = file.read_bytes()
        rng = random.Random(0)
        refused = 0
        for _ in range(50):
            damaged = bytearray(whole)
            damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
            file.write_bytes(damaged)
            try:
                params = load_keras_checkpoint(checkpoint)[1]
            except ValueError as error:
                assert "cp.ckpt" in str(error)
                refused += 1
            else:  # in the object graph or the optimizer's state
                assert same(params, expected)
        assert refused > 20
        file.write_bytes(whole)


def test_load_keras_checkpoint_without_data(checkpoint):
    next(checkpoint.parent.glob("*.data-*")).unlink()
    with pytest.raises(ValueError, match=r"data-00000-of-00001 is missing"):
        load_keras_checkpoint(checkpoint)


def test_load_keras_checkpoint_newest_of_a_folder(checkpoint):
    for file in list(checkpoint.parent.iterdir()):
        shutil.copy(file, file.with_name(file.name.replace("cp", "later")))
    with pytest.raises(ValueError, match="not a TensorFlow checkpoint"):
        load_keras_checkpoint(checkpoint.parent)  # two, and nothing says which
    (checkpoint.parent / "checkpoint").write_text('model_checkpoint_path: "/home/somebody/later.ckpt"\n')
    assert same(load_keras_checkpoint(checkpoint.parent)[1], load_keras_checkpoint(checkpoint)[1])


@pytest.mark.slow
@pytest.mark.thorough
def test_read_h5_flipped_bits_load_or_raise_one_error(tmp_path):
    """The format has no checksums: numbers may change, but nothing else than a clear error may happen."""
    whole = WHOLE.read_bytes()
    path = tmp_path / "a.weights.h5"
    rng = random.Random(0)
    refused = 0
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            load_keras(path)
        except ValueError as error:
            assert "a.weights.h5" in str(error)
            refused += 1
    assert refused > 2
