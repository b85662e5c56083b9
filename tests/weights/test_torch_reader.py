from __future__ import annotations

import io
import json
import pickle
import random
import shutil
import struct
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest

from gpt2jax.weights.formats import load_weights
from gpt2jax.weights.hf import load_hf
from gpt2jax.weights.torch_reader import LEGACY_START, read_state_dict, read_torch

GOLDEN = Path(__file__).parent.parent / "golden"
FOLDERS = ("hf-bin-zip", "hf-bin-legacy")


@pytest.fixture(scope="module")
def expected() -> dict:
    """The same model, from its safetensors file."""
    return load_hf(GOLDEN / "hf-tied")[1]


def same(params, others) -> bool:
    leaves = zip(jax.tree.leaves(params), jax.tree.leaves(others), strict=True)
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in leaves)


@pytest.fixture(params=FOLDERS)
def copied(request, tmp_path) -> Path:
    """A file of torch.save that may be damaged, its config.json beside it."""
    shutil.copytree(GOLDEN / request.param, tmp_path / "model")
    return tmp_path / "model" / "pytorch_model.bin"


@pytest.mark.parametrize("name", FOLDERS)
def test_load_weights_bin_equals_safetensors(name, expected):
    config, params, tokenizer = load_weights(GOLDEN / name)
    assert config == load_hf(GOLDEN / "hf-tied")[0] and tokenizer is None
    assert same(params, expected)
    assert same(load_weights(GOLDEN / name / "pytorch_model.bin")[1], expected)


def test_load_weights_bin_shards_and_index(copied, expected):
    """Two names for one file do: what is read is what the index says of each."""
    names = list(read_state_dict(copied))
    copied.rename(copied.with_name("pytorch_model-00001-of-00001.bin"))
    index = copied.with_name("pytorch_model.bin.index.json")
    places = dict.fromkeys(names, "pytorch_model-00001-of-00001.bin")
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert same(load_weights(copied.parent)[1], expected)
    index.write_text(json.dumps({"metadata": {}, "weight_map": {n: places[n] for n in names[1:]}}))
    with pytest.raises(ValueError, match=f"{names[0]} is there, but not in the index"):
        load_weights(copied.parent)


@pytest.mark.slow
def test_read_torch_cut_short_anywhere(copied):
    whole = copied.read_bytes()
    rng = random.Random(0)
    for length in [0, 1, 20, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(200))]:
        copied.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
            load_hf(copied)


@pytest.mark.slow
@pytest.mark.thorough
def test_read_torch_flipped_bits_in_the_description(copied, expected):
    """Every entry of the zip has a checksum; the legacy format has none for the numbers, only its head is hit."""
    whole = copied.read_bytes()
    is_zip = whole.startswith(b"PK")
    end = len(whole) if is_zip else whole.rindex(b"\x80\x02]") + 100
    rng = random.Random(0)
    refused = 0
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[rng.randrange(end)] ^= 1 << rng.randrange(8)
        copied.write_bytes(damaged)
        try:
            params = load_hf(copied)[1]
        except ValueError as error:
            assert "pytorch_model.bin" in str(error)
            refused += 1
        else:  # a bit that says nothing: padding, the date of an entry, a mask, the name of the platform
            assert same(params, expected)
    assert refused > 50


class Command:
    """Pickles as a call of a function that would write a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (io.open, (str(self.path), "w"))


def zip_file(path: Path, program: bytes, entries: dict[str, bytes] | None = None, **options) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("archive/data.pkl", program)
        for name, content in (entries or {}).items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("kind", ["zip", "legacy"])
@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_read_torch_refuses_to_run_a_command(tmp_path, kind, protocol):
    victim = tmp_path / "victim"
    program = pickle.dumps({"wte.weight": Command(victim)}, protocol)
    path = tmp_path / "pytorch_model.bin"
    if kind == "zip":
        zip_file(path, program)
    else:
        path.write_bytes(LEGACY_START + pickle.dumps(1001, 2) + pickle.dumps({}, 2) + program)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*refused") as info:
        read_torch(path)
    if protocol >= 2:
        assert "open" in str(info.value)
    assert not victim.exists()


@pytest.mark.parametrize(
    "call",
    [b"cbuiltins\neval\n", b"cos\nsystem\n", b"ctorch\nload\n", b"ctorch._utils\n_rebuild_qtensor\n"],
)
def test_read_torch_refuses_calls_by_name(tmp_path, call):
    program = b"\x80\x02" + call + b"X\x01\x00\x00\x00a\x85R."
    name = call[1:].decode().strip().replace("\n", ".")
    with pytest.raises(ValueError, match=f"it would call {name}, which is refused"):
        read_torch(zip_file(tmp_path / "a.bin", program))


def tensor_program(key=b"0", kind=b"FloatStorage", numel=4, offset=0, shape=(2, 2), strides=(2, 1)) -> bytes:
    """{"a": a tensor} as torch pickles it."""

    def number(n: int) -> bytes:
        return b"\x8a\x09" + n.to_bytes(9, "little", signed=True)

    def numbers(items) -> bytes:
        return b"(" + b"".join(number(n) for n in items) + b"t"

    def text(value: bytes) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value

    storage = (
        b"("
        + text(b"storage")
        + b"ctorch\n"
        + kind
        + b"\n"
        + text(key)
        + text(b"cpu")
        + number(numel)
        + b"tQ"
    )
    rebuild = (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + numbers(shape) + numbers(strides)
    )
    return b"\x80\x02}" + text(b"a") + rebuild + b"\x89}tRs."


def test_read_state_dict_views_of_a_storage(tmp_path):
    data = np.arange(6, dtype=np.float32).tobytes()
    program = tensor_program(numel=6, offset=1, shape=(2, 2), strides=(1, 2))
    tensor = read_state_dict(zip_file(tmp_path / "a.bin", program, {"archive/data/0": data}))["a"]
    assert tensor.shape == (2, 2) and tensor.dtype == "float32"
    np.testing.assert_array_equal(tensor.read(), [[1, 3], [2, 4]])


@pytest.mark.parametrize(
    "changes",
    [
        {"numel": 10**15},
        {"numel": -4},
        {"shape": (3, 2)},
        {"shape": (2**60, 2**60), "strides": (2**60, 1)},
        {"shape": (-2, -2)},
        {"offset": 1},
        {"offset": -1},
        {"strides": (-2, 1)},
        {"strides": (1,)},
        {"kind": b"QInt8Storage"},
        {"key": b"../0"},
        {"key": b"1"},
    ],
)
def test_read_state_dict_refuses_impossible_tensors(tmp_path, changes):
    path = zip_file(tmp_path / "a.bin", tensor_program(**changes), {"archive/data/0": bytes(16)})
    with pytest.raises(ValueError, match=r"a\.bin"):
        read_state_dict(path)


@pytest.mark.parametrize(
    "name", ["../../outside", "/outside", "archive/../../outside", "archive\\..\\outside"]
)
def test_read_torch_refuses_zip_entries_outside(tmp_path, name):
    path = zip_file(tmp_path / "a.bin", tensor_program(), {"archive/data/0": bytes(16), name: b"x"})
    with pytest.raises(ValueError, match=r"a\.bin.*outside"):
        read_torch(path)


def test_read_torch_refuses_a_compressed_bomb(tmp_path):
    path = zip_file(tmp_path / "a.bin", bytes(10**7), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"a\.bin.*compressed"):
        read_torch(path)


@pytest.mark.parametrize(
    "program",
    [
        b"",
        b".",
        b"\x80\x02}",
        b"\x80\x02(((t.",
        b"\x80\x02h\x05.",
        b"\x80\x02r\xff\xff\xff\xff.",
        b"\x80\x02X\xff\xff\xff\xffa.",
        b"\x80\x02]}s.",
        b"\x80\x02}K\x01a.",
        b"\x80\x02}(K\x01u.",
        b"\x80\x02}]]s.",
        b"\x80\x02K\x01K\x02R.",
        b"\x80\x02K\x01Q.",
        b"\x80\x02\x88.",
    ],
)
def test_read_state_dict_refuses_meaningless_pickles(tmp_path, program):
    with pytest.raises(ValueError, match=r"a\.bin"):
        read_state_dict(zip_file(tmp_path / "a.bin", program))


def test_read_state_dict_nested_copies_stay_small(tmp_path):
    """A thousand lists, each holding the one before it twice, say 2**1000 items and must not be spelled out."""
    step = b"q\x00](h\x00h\x00e"  # remember the last list, and put it into a new one twice
    program = b"\x80\x02]" + 1000 * step + b"."
    with pytest.raises(ValueError, match=r"a\.bin"):
        read_state_dict(zip_file(tmp_path / "a.bin", program))


def test_read_torch_other_contents(tmp_path):
    path = zip_file(tmp_path / "a.bin", pickle.dumps({"epoch": 3, "names": ["a", "b"], "rate": 0.5}, 2))
    assert read_torch(path) == {"epoch": 3, "names": ["a", "b"], "rate": 0.5}
    with pytest.raises(ValueError, match="epoch must be a tensor with a name, got a int"):
        read_state_dict(path)
    (tmp_path / "b.bin").write_bytes(b"something else entirely")
    with pytest.raises(ValueError, match=r"b\.bin is not a file of torch\.save"):
        read_torch(tmp_path / "b.bin")
