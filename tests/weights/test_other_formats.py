"""Weights as other programs leave them, built to their layouts, and files that only stand for weights."""

from __future__ import annotations

import dataclasses
import json
import pickle
import struct
import zipfile
from pathlib import Path

import h5py
import jax
import numpy as np
import pytest
from flax import serialization
from tiny_models import random_params

from gpt2jax.model.config import GPT2Config
from gpt2jax.utils.notices import Notice
from gpt2jax.weights import hf, nanogpt
from gpt2jax.weights.formats import load_weights
from gpt2jax.weights.hf import save_hf
from gpt2jax.weights.mapping import export_tensors
from gpt2jax.weights.nanogpt import load_nanogpt
from gpt2jax.weights.torch_reader import PickledObject, read_torch

TINY = GPT2Config(vocab_size=300, n_positions=16, n_embd=24, n_layer=3, n_head=2)
PARAMS = random_params(TINY)
GOLDEN = Path(__file__).parent.parent / "golden"


def write_config(folder: Path, config: GPT2Config = TINY) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    return folder


def assert_same(loaded, params=PARAMS) -> None:
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


# Flax


def write_flax(folder: Path, *, prefix: bool = True, dtype: str = "float32") -> Path:
    tree: dict = {}
    for name, values in export_tensors(TINY, hf.RULES, PARAMS):
        *parents, leaf = name.split(".")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        kinds = {"wte": "embedding", "wpe": "embedding", "ln_1": "scale", "ln_2": "scale", "ln_f": "scale"}
        leaf = kinds.get(parents[-1], "kernel") if leaf == "weight" else leaf
        node[leaf] = np.asarray(jax.numpy.asarray(values.T if leaf == "kernel" else values, dtype))
    content = serialization.msgpack_serialize({"transformer": tree} if prefix else tree)
    (write_config(folder) / "flax_model.msgpack").write_bytes(content)
    return folder


@pytest.mark.parametrize("prefix", [True, False])
def test_open_flax_reads_what_flax_writes(tmp_path, prefix):
    folder = write_flax(tmp_path / "a", prefix=prefix)
    assert_same(load_weights(folder)[1])
    assert_same(load_weights(folder / "flax_model.msgpack")[1])


def test_open_flax_16_bits(tmp_path):
    params = load_weights(write_flax(tmp_path / "a", dtype="bfloat16"))[1]
    expected = jax.tree.map(lambda leaf: leaf.astype("bfloat16").astype("float32"), PARAMS)
    assert_same(params, expected)


def test_open_flax_cut_short_or_damaged(tmp_path):
    folder = write_flax(tmp_path / "a")
    file = folder / "flax_model.msgpack"
    whole = file.read_bytes()
    for length in [0, *range(1, len(whole), 4001), len(whole) - 1]:
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"flax_model\.msgpack"):
            load_weights(folder)
    for content in (b"\xdf\xff\xff\xff\xff", b"\x91" * 5000, b"\x81\xa1a\x05", whole + b"\0"):
        file.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"flax_model\.msgpack is cut short, damaged, or not Flax weights"
        ):
            load_weights(folder)


# TensorFlow


@pytest.mark.parametrize(
    "root", ["transformer/tfgp_t2lm_head_model/transformer", "transformer/tfgpt2_model/transformer"]
)
@pytest.mark.parametrize("table", ["weight", "embeddings"])
def test_open_tf_h5(tmp_path, root, table):
    config = dataclasses.replace(TINY, tie_word_embeddings=False)  # which these models ignore
    with h5py.File(write_config(tmp_path / "a", config) / "tf_model.h5", "w") as file:
        for name, values in export_tensors(TINY, hf.RULES, PARAMS):
            *parents, leaf = name.split(".")
            if parents[-1].startswith("ln_"):
                leaf = {"weight": "gamma", "bias": "beta"}[leaf]
            elif parents[-1] in ("wte", "wpe"):
                leaf = table
            if parents[0] == "h":
                parents[:2] = [f"h_._{parents[1]}"]
            file["/".join([root, *parents, f"{leaf}:0"])] = values[None] if leaf == "bias" else values
    assert_same(load_weights(tmp_path / "a")[1])
    assert_same(load_weights(tmp_path / "a" / "tf_model.h5")[1])


# llm.c


def write_llmc(path: Path, *, version: int = 3, padded: int = 320) -> Path:
    header = np.zeros(256, np.int32)
    rows = TINY.vocab_size if version == 1 else padded
    sizes = (TINY.n_positions, TINY.vocab_size, TINY.n_layer, TINY.n_head, TINY.n_embd, rows)
    header[:8] = 20240326, version, *sizes
    tensors = dict(export_tensors(TINY, nanogpt.RULES, PARAMS))
    table = np.zeros((rows, TINY.n_embd), np.float32)
    table[: TINY.vocab_size] = tensors["wte.weight"]
    order = [table, tensors["wpe.weight"]]
    names = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    for name in (f"{part}.{leaf}" for part in names for leaf in ("weight", "bias")):
        order += [tensors[f"h.{layer}.{name}"] for layer in range(TINY.n_layer)]
    order += [tensors["ln_f.weight"], tensors["ln_f.bias"]]
    values = np.concatenate([np.ravel(array) for array in order])
    values = np.asarray(jax.numpy.asarray(values, "bfloat16" if version == 5 else "float32"))
    path.write_bytes(header.tobytes() + values.tobytes())
    return path


@pytest.mark.parametrize("version", [1, 3, 5])
def test_open_llmc(tmp_path, version):
    config, params, tokenizer = load_weights(write_llmc(tmp_path / "gpt2_124M.bin", version=version))
    assert tokenizer is None and config.activation_function == "gelu_new"
    assert config.eos_token_id is None  # the last id of another vocabulary than GPT-2's is an ordinary token
    assert dataclasses.replace(config, eos_token_id=TINY.eos_token_id, bos_token_id=TINY.bos_token_id) == TINY
    rounded = jax.tree.map(lambda leaf: leaf.astype("bfloat16").astype("float32"), PARAMS)
    assert_same(params, rounded if version == 5 else PARAMS)


def test_open_llmc_damaged(tmp_path):
    path = write_llmc(tmp_path / "a.bin")
    whole = path.read_bytes()
    for content, message in (
        (whole[:-4], "must have .* bytes by its header, got"),
        (whole[:100], "is cut short: its header"),
        (whole[:4] + struct.pack("<i", 9) + whole[8:], "the version must be one of 1, 3, 5, got 9"),
        (
            whole[:28] + struct.pack("<i", 64) + whole[32:],
            "padded_vocab_size must be at least vocab_size, .* got 64",
        ),
        (whole[:16] + struct.pack("<i", 10**9) + whole[20:], "must have .* bytes by its header"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_weights(path)


def test_load_weights_names_a_model_of_llmc_in_a_folder(tmp_path):
    write_llmc(tmp_path / "gpt2_124M.bin")
    with pytest.raises(
        ValueError, match="but gpt2_124M.bin; give the path of the file, such as .*gpt2_124M.bin"
    ):
        load_weights(tmp_path)


# nanoGPT of other years


def with_content(monkeypatch, change) -> None:
    def read(path):
        content = read_torch(path)
        return change(content) or content

    monkeypatch.setattr(nanogpt, "read_torch", read)


@pytest.mark.parametrize(("name", "has_bias"), [("nanogpt-bias", True), ("nanogpt-plain", False)])
def test_load_nanogpt_without_bias_in_its_settings(monkeypatch, name, has_bias):
    expected = load_nanogpt(GOLDEN / name)[1]
    with_content(monkeypatch, lambda c: c["model_args"].pop("bias") and None)
    config, params = load_nanogpt(GOLDEN / name)
    assert config.activation_function == "gelu_new" and config.tie_word_embeddings
    assert_same(params, expected)
    assert has_bias == bool(np.any(params["h"]["attn"]["c_attn"]["bias"]))


def test_load_nanogpt_with_flash_and_a_head_apart(monkeypatch):
    def change(content):
        content["model_args"]["flash"] = True
        head = content["model"]["transformer.wte.weight"]
        other = dataclasses.replace(head, read=lambda: head.read() + 1, offset=None)
        content["model"]["lm_head.weight"] = other

    with_content(monkeypatch, change)
    config, params = load_nanogpt(GOLDEN / "nanogpt-bias")
    assert not config.tie_word_embeddings
    np.testing.assert_array_equal(params["lm_head"]["kernel"], params["wte"]["embedding"] + 1)


def test_load_nanogpt_of_the_first_half_of_2023_says_which_gelu(tmp_path):
    with (
        zipfile.ZipFile(GOLDEN / "nanogpt-bias" / "ckpt.pt") as source,
        zipfile.ZipFile(tmp_path / "ckpt.pt", "w") as target,
    ):
        for entry in source.infolist():
            if not entry.filename.endswith("/byteorder"):  # PyTorch before 2.1 did not write it
                target.writestr(entry.filename, source.read(entry))
    with pytest.warns(Notice, match="ckpt.pt: the exact GELU is taken; .* nanoGPT from before June 2023"):
        assert load_nanogpt(tmp_path)[0].activation_function == "gelu"


def test_load_nanogpt_reads_the_config_object_of_build_nanogpt(monkeypatch):
    def change(content):
        fields = {
            name: content["model_args"][name]
            for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
        }
        return {"model": content["model"], "config": PickledObject("__main__.GPTConfig", fields), "step": 1}

    expected = load_nanogpt(GOLDEN / "nanogpt-bias")[1]
    with_content(monkeypatch, change)
    config, params = load_nanogpt(GOLDEN / "nanogpt-bias")
    assert config.activation_function == "gelu_new"
    assert_same(params, expected)


@dataclasses.dataclass
class Settings:
    block_size: int = 8

    def __setstate__(self, state):
        raise AssertionError("it was executed")


def test_read_torch_keeps_objects_unmade(tmp_path):
    import io

    from gpt2jax.weights.torch_reader import _Interpreter

    machine = _Interpreter(tmp_path / "a.pt", lambda storage: None)
    found = machine.run(io.BytesIO(pickle.dumps({"config": Settings(4)}, protocol=2)))["config"]
    assert found == PickledObject(f"{Settings.__module__}.Settings", {"block_size": 4})
    nested = pickle.dumps({((1, 2), 3): 4}, protocol=2)
    with pytest.raises(ValueError, match="a key that is neither a text nor a whole number"):
        machine.run(io.BytesIO(nested))


# Files that only stand for weights, and folders with several


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "ckpt.pt", "tf_model.h5", "flax_model.msgpack"]
)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
            "is a Git LFS pointer: fetch the file",
        ),
        ("\n<!DOCTYPE html>\n<html><body>404", "is an HTML page"),
        ("<html lang='en'>", "is an HTML page"),
    ],
)
def test_load_weights_names_what_only_stands_for_a_file(tmp_path, name, content, message):
    (write_config(tmp_path / "a") / name).write_text(content)
    for path in (tmp_path / "a", tmp_path / "a" / name):
        with pytest.raises(ValueError, match=f"{name} {message}"):
            load_weights(path)


def test_load_weights_names_quantized_weights(tmp_path):
    from gpt2jax.weights.safetensors_io import write_safetensors

    save_hf(tmp_path / "a", TINY, PARAMS)
    content = json.loads((tmp_path / "a" / "config.json").read_text())
    quantized = {**content, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (tmp_path / "a" / "config.json").write_text(json.dumps(quantized))
    with pytest.raises(ValueError, match=r"quantization_config says that the weights are quantized \(gptq\)"):
        load_weights(tmp_path / "a")
    write_config(tmp_path / "a")
    tensors = [("transformer.h.0.attn.c_attn.qweight", np.zeros((2, 2), np.float32))]
    write_safetensors(tmp_path / "a" / "model.safetensors", tensors, "float32", {})
    with pytest.raises(
        ValueError, match=r"holds quantized weights \(transformer.h.0.attn.c_attn.qweight\), as GPTQ"
    ):
        load_weights(tmp_path / "a")


def test_load_weights_of_a_folder_with_several_checkpoints(tmp_path):
    for step in (500, 1000):
        save_hf(tmp_path / "run" / f"checkpoint-{step}", TINY, PARAMS)
    with pytest.raises(
        ValueError, match=r"several checkpoints: checkpoint-500, checkpoint-1000; name one, such as .*-1000"
    ):
        load_weights(tmp_path / "run")


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "weights.safetensors"])
def test_load_weights_names_files_of_other_names(tmp_path, name):
    save_hf(tmp_path / "a", TINY, PARAMS)
    (tmp_path / "a" / "model.safetensors").rename(tmp_path / "a" / name)
    with pytest.raises(ValueError, match=rf"but {name}; give the path of the file, such as .*a/{name}"):
        load_weights(tmp_path / "a")
    assert_same(load_weights(tmp_path / "a" / name)[1], PARAMS)


def test_open_openai_by_index_and_prefix(tmp_path):
    import shutil

    source = GOLDEN / "openai"
    expected = load_weights(source)[1]
    (prefix,) = [file.name.removesuffix(".index") for file in source.glob("*.index")]
    for step in (900, 1000):
        for file in source.glob(f"{prefix}.*"):
            shutil.copy(file, tmp_path / file.name.replace(prefix, f"model-{step}"))
    shutil.copy(source / "hparams.json", tmp_path)
    assert_same(load_weights(tmp_path / "model-1000.index")[1], expected)
    assert_same(load_weights(tmp_path / "model-900")[1], expected)
    with pytest.raises(ValueError, match=r"several checkpoints: model-1000, model-900; name one"):
        load_weights(tmp_path)
    (tmp_path / "hparams.json").unlink()
    with pytest.raises(ValueError, match=r"is a checkpoint of OpenAI's GPT-2; put its hparams.json into"):
        load_weights(tmp_path / "model-1000.index")
