"""Small files that ask for much time or memory: each is refused by name, or read, within its bounds."""

from __future__ import annotations

import gzip
import itertools
import json
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import gpt2jax
from gpt2jax import loading
from gpt2jax.data.sources import load_texts
from gpt2jax.model.config import GPT2Config
from gpt2jax.tokenizer.bpe import Tokenizer
from gpt2jax.tokenizer.files import load_tokenizer, save_tokenizer
from gpt2jax.utils import limits
from gpt2jax.utils.json_files import read_json
from gpt2jax.weights import tf_checkpoint
from gpt2jax.weights.flax_msgpack import read_msgpack
from gpt2jax.weights.formats import load_weights
from gpt2jax.weights.h5_reader import read_h5
from gpt2jax.weights.hf import RULES
from gpt2jax.weights.mapping import LazyTensor, file_shapes, load_params
from gpt2jax.weights.torch_reader import read_torch


def write_vocabulary(folder: Path, characters: str, doublings: int) -> None:
    """Write a tokenizer whose merges double each of some tokens again and again."""
    save_tokenizer(Tokenizer.gpt2(257), folder)
    vocabulary, merges = json.loads((folder / "vocab.json").read_text()), []
    for token in characters:
        for _ in range(doublings):
            merges.append(f"{token} {token}")
            token += token
            vocabulary[token] = len(vocabulary)
    for file in folder.iterdir():
        file.unlink()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))


def test_load_tokenizer_merges_that_double_a_token(tmp_path):
    write_vocabulary(tmp_path, "a", 14)
    with pytest.raises(ValueError, match="a token must have at most 1024 bytes, got 16384"):
        load_tokenizer(tmp_path)
    write_vocabulary(tmp_path, "abcdefgh", 10)
    began = time.process_time()
    tokenizer = load_tokenizer(tmp_path)
    assert time.process_time() - began < 2  # 6 s before, and it grew with the square of the length
    assert tokenizer.encode("a" * 1024 + "bb") == [266, 267]


@pytest.mark.slow
def test_load_tokenizer_tokens_that_begin_with_each_other(tmp_path):
    save_tokenizer(Tokenizer.gpt2(257), tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"a" * i: 300 + i for i in range(2, 600)}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a" * 599 + " " + "a" * 30 + "b") == [899, 220, 330, 65]


def test_read_torch_lists_that_hold_each_other(tmp_path):
    program = bytearray(b"\x80\x02}(X\x05\0\0\0model}X\x0a\0\0\0model_args}(X\x07\0\0\0n_layer)")
    for number in range(40):  # a tuple of the same tuple twice
        program += b"q%ch%c\x86" % (number, number)
    for name in (b"n_head", b"n_embd", b"block_size", b"bias", b"vocab_size"):
        program += b"X" + struct.pack("<I", len(name)) + name + b"K\x02"
    with zipfile.ZipFile(tmp_path / "ckpt.pt", "w") as archive:
        archive.writestr("a/data.pkl", bytes(program + b"uu."))
    with pytest.raises(ValueError, match=r"ckpt.pt: model_args: n_layer must be .*, got \(\(") as info:
        load_weights(tmp_path)
    assert len(str(info.value)) < 500


def test_read_torch_a_tensor_of_one_number(tmp_path):
    program = (
        b"\x80\x02}X\x01\0\0\0actorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\n"
    )
    program += b"X\x01\0\0\x000X\x03\0\0\0cpuK\x01tQK\0J\xff\xff\xff\x7fK\x10\x86K\0K\0\x86\x89"
    program += b"ccollections\nOrderedDict\n)RtRs."
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/data.pkl", program)
        archive.writestr("a/data/0", b"\0\0\0\0")
    with pytest.raises(ValueError, match=r"a.pt .*a tensor of shape \[2147483647, 16\] does not fit"):
        read_torch(tmp_path / "a.pt")


def test_read_h5_groups_that_hold_each_other(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        groups = [file.create_group(f"g{number}") for number in range(15)]
        for outer, inner in itertools.pairwise(groups):
            for name in "abcd":
                outer[name] = inner
        groups[-1]["x"] = np.zeros(3)
    with pytest.raises(ValueError, match=r"a.h5 .* groups .* hold each other"):
        read_h5(tmp_path / "a.h5")


def test_read_msgpack_names_that_share_a_beginning(tmp_path):
    inner = b"".join(b"\xa5%05d\x80" % number for number in range(10_000))
    name = b"a" * 100_000
    content = b"\x81\xdb" + struct.pack(">I", len(name)) + name + b"\xde" + struct.pack(">H", 10_000) + inner
    (tmp_path / "a.msgpack").write_bytes(content)
    with pytest.raises(ValueError, match=r"a.msgpack .* a name has more than 1000 characters"):
        read_msgpack(tmp_path / "a.msgpack")


def test_read_checkpoint_names_that_share_a_beginning(monkeypatch):
    monkeypatch.setattr(tf_checkpoint, "masked_crc32c", lambda data: 0)
    block = b"\x00\xe9\x07\x00" + b"a" * 1001 + struct.pack("<II", 0, 1)
    with pytest.raises(ValueError, match="a name has more than 1000 bytes"):
        list(tf_checkpoint._block(block + b"\0" * 5, 0, len(block)))


def test_load_params_tensors_that_share_their_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "FREE_BYTES", 1000)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=101, n_positions=32)
    (tmp_path / "weights").write_bytes(b"\0" * 4000)
    tensors = {
        name: LazyTensor(
            shape, "float32", lambda shape=shape: np.zeros(shape, np.float32), str(tmp_path / "weights")
        )
        for name, shape in file_shapes(config, RULES).items()
    }
    with pytest.raises(
        ValueError, match=rf"a unpacks to 1\d\d,\d+ bytes or more, from 4,000; {limits.VARIABLE}="
    ):
        load_params(config, RULES, tensors, "a")
    monkeypatch.setenv(limits.VARIABLE, "1000000")
    load_params(config, RULES, tensors, "a")


def test_load_a_run_or_checkpoint_that_leads_back_to_itself(tmp_path):
    run, checkpoint = tmp_path / "run", tmp_path / "checkpoint"
    for folder in (run / "adapter", checkpoint / "state", checkpoint / "run"):
        folder.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"base_model": str(run)}))
    (checkpoint / "run" / "metadata").write_text(json.dumps({"base_model": str(checkpoint), "finetune": {}}))
    for folder in (run, checkpoint):
        with pytest.raises(ValueError, match=rf"^{folder} .* leads back to it"):
            gpt2jax.load(folder)


@pytest.mark.parametrize(("name", "kind"), [("none-such", ValueError), ("./none/such", FileNotFoundError)])
def test_load_checkpoint_of_a_model_that_is_not_there(monkeypatch, name, kind):
    monkeypatch.setattr(loading, "read_run", lambda path: {"finetune": {}, "base_model": name})
    with pytest.raises(kind, match="^run/checkpoints/1 began with a model that can't be loaded: there is no"):
        loading.load_checkpoint(Path("run/checkpoints/1"))


def test_read_json_size(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "JSON_BYTES", 25_000)
    (tmp_path / "a.json").write_text('{"a": [' + "{}," * 9_000 + "1]}")
    with pytest.raises(
        ValueError, match=rf"a.json must have at most 25,000 bytes, got .*; {limits.VARIABLE}="
    ):
        read_json(tmp_path / "a.json")
    monkeypatch.setenv(limits.VARIABLE, "1e9")
    with pytest.raises(ValueError, match=f"{limits.VARIABLE} must be a number of bytes, got '1e9'"):
        read_json(tmp_path / "a.json")


FREE, LONG = 400_000, 120_000  # bytes, and characters of a text that takes more


def packed_line(path: Path) -> None:
    path.write_bytes(gzip.compress(b"a" * LONG, 1))


def packed_lines(path: Path) -> None:
    path.write_bytes(gzip.compress(b"aaaaaaaaa\n" * (LONG // 10), 1))


def packed_cell(path: Path) -> None:
    path.write_bytes(gzip.compress(b'text\n"' + b"aaaaaaaaaaaaaaaa\n" * (LONG // 17) + b'"\n', 1))


def packed_array(path: Path) -> None:
    path.write_bytes(gzip.compress(b"[\n" + b'"aaaaaaaaaaaaaaaaaa",\n' * (LONG // 22) + b'""]', 1))


def parquet_cell(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a" * 900_000]}), path, compression="zstd")


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.txt.gz", packed_line),
        ("b.txt.gz", packed_lines),
        ("a.csv.gz", packed_cell),
        ("a.json.gz", packed_array),
        ("a.parquet", parquet_cell),
    ],
)
def test_load_texts_unpacked_in_memory(tmp_path, monkeypatch, name, write: Callable[[Path], None]):
    monkeypatch.setattr(limits, "FREE_BYTES", FREE)
    write(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name} unpacks to .*; {limits.VARIABLE}=BYTES allows more"):
        load_texts(str(tmp_path / name), "all")
