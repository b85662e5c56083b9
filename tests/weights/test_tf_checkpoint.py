from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from gpt2jax.weights.openai import load_openai
from gpt2jax.weights.tf_checkpoint import FOOTER, MAGIC, masked_crc32c, read_checkpoint

GOLDEN = Path(__file__).parent.parent / "golden"


def test_masked_crc32c_of_bytes_and_arrays():
    crc = 0xE3069283  # the usual check value, of b"123456789"
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    data = np.frombuffer(b"123456789", np.uint8)
    assert masked_crc32c(b"123456789") == masked_crc32c(data) == masked_crc32c(data.copy()) == masked
    numbers = np.arange(6, dtype=np.float32).reshape(2, 3).astype(ml_dtypes.bfloat16)
    assert masked_crc32c(numbers) == masked_crc32c(numbers.tobytes())


@pytest.fixture
def openai(tmp_path) -> Path:
    shutil.copytree(GOLDEN / "openai", tmp_path / "openai")
    return tmp_path / "openai"


def test_read_checkpoint_names_shapes_and_dtypes():
    tensors = read_checkpoint(GOLDEN / "openai" / "model.ckpt")
    assert len(tensors) == 2 + 12 * 2 + 2
    kernel = tensors["model/h1/attn/c_attn/w"]
    assert kernel.shape == (1, 16, 48) and kernel.dtype == "float32" and kernel.read().shape == (1, 16, 48)
    mixed = read_checkpoint(GOLDEN / "keras-nlp" / "cp.ckpt")
    steps = mixed["optimizer/_iterations/.ATTRIBUTES/VARIABLE_VALUE"]
    assert (steps.shape, steps.dtype, steps.read().item()) == ((), "int64", 0)
    assert not any("OBJECT_GRAPH" in name for name in mixed)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cut short"),
        (bytes(FOOTER), "cut short, or not an index"),
        (bytes(FOOTER - 8) + MAGIC, "reaches over its end"),
        (b"\xff" * (FOOTER - 8) + MAGIC, "too many digits"),
        (b"\x80" * 100, "cut short, or not an index"),
    ],
)
def test_read_checkpoint_refuses_other_files(tmp_path, content, message):
    (tmp_path / "a.ckpt.index").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.ckpt\.index.*{message}"):
        read_checkpoint(tmp_path / "a.ckpt")


def table(entries: list[tuple[bytes, bytes]], compression: int = 0) -> bytes:
    """An index with one block, made by hand."""

    def block(items) -> bytes:
        body = b"".join(bytes([0, len(key), len(value)]) + key + value for key, value in items)
        body += (0).to_bytes(4, "little") + (1).to_bytes(4, "little") + bytes([compression])
        return body + masked_crc32c(body).to_bytes(4, "little")

    data = block(entries)
    blocks = block([(b"z", bytes([0, len(data) - 5]))])
    footer = bytes([0, 0, len(data), len(blocks) - 5])
    assert len(data) < 128 and len(blocks) < 128
    return data + blocks + footer.ljust(FOOTER - 8, b"\0") + MAGIC


HEADER = (b"", b"\x08\x01")  # one data file


def entry(dtype: int = 1, dims: tuple[int, ...] = (2,), size: int = 8, extra: bytes = b"") -> bytes:
    shape = b"".join(bytes([0x12, 2, 0x08, dim]) for dim in dims)
    return bytes([0x08, dtype, 0x12, len(shape)]) + shape + bytes([0x28, size, 0x35]) + bytes(4) + extra


def test_read_checkpoint_table_made_by_hand(tmp_path):
    numbers = np.array([1.5, -2.0], np.float32)
    checksum = masked_crc32c(numbers).to_bytes(4, "little")
    good = entry()[:-4] + checksum
    (tmp_path / "a.index").write_bytes(table([HEADER, (b"x", good)]))
    (tmp_path / "a.data-00000-of-00001").write_bytes(numbers.tobytes())
    np.testing.assert_array_equal(read_checkpoint(tmp_path / "a")["x"].read(), numbers)
    (tmp_path / "a.index").write_bytes(table([HEADER, (b"x", entry())]))
    with pytest.raises(ValueError, match="the checksum of tensor x does not match"):
        read_checkpoint(tmp_path / "a")["x"].read()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (table([(b"x", entry())]), "no header"),
        (table([(b"", b"\x08\x01\x10\x01"), (b"x", entry())]), "big-endian"),
        (table([HEADER, (b"x", entry())], compression=1), "compressed"),
        (table([HEADER, (b"x", entry(dims=(3,)))]), r"x \[3\] float32 cannot have 8 bytes"),
        (table([HEADER, (b"x", entry(size=127))]), "cut short: x ends at 127"),
        (table([HEADER, (b"x", entry(extra=b"\x3a\x00"))]), "x is saved in slices"),
        (table([HEADER, (b"x", b"\x0f")]), "unknown kind 7"),
        (table([HEADER, (b"x", b"\x12\x7f\x00")]), "reaches over its end"),
        (table([HEADER, (b"x", b"\x0a\x00")]), "is not a number"),
        (table([HEADER, (b"\xff", entry())]), "damaged"),
    ],
)
def test_read_checkpoint_refuses_wrong_tables(tmp_path, content, message):
    (tmp_path / "a.index").write_bytes(content)
    (tmp_path / "a.data-00000-of-00001").write_bytes(bytes(8))
    with pytest.raises(ValueError, match=message) as info:
        read_checkpoint(tmp_path / "a")
    assert str(tmp_path / "a") in str(info.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": 3}, r"model/h2/ln_1/g: missing, expected \[16\]"),
        ({"n_embd": 32}, r"model/wte: has shape \[97, 16\], expected \[97, 32\]"),
        ({"n_head": 5}, "n_head.*5"),
        ({"n_vocab": None}, "n_vocab must be a whole number, got None"),
    ],
)
def test_load_openai_hparams_of_another_model(openai, changes, message):
    path = openai / "hparams.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=message):
        load_openai(openai)


def test_load_openai_refuses_other_folders(openai):
    for content in ("", "[]", '{"n_vocab": 97}'):
        (openai / "hparams.json").write_text(content)
        with pytest.raises(ValueError, match=r"hparams\.json"):
            load_openai(openai)
    (openai / "hparams.json").unlink()
    with pytest.raises(ValueError, match=r"hparams\.json"):
        load_openai(openai)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_openai(openai / "nowhere")
