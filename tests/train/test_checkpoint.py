"""Checkpoints under any path, with checksums that tell every damage."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpt2jax.weights.orbax as orbax_module
from gpt2jax.train.checkpoint import BestCheckpoint, Checkpoints
from gpt2jax.utils.notices import Notice
from gpt2jax.weights.orbax import CHECKSUMS, restore_trained

STATE = {"step": jnp.zeros((), jnp.int32), "params": {"a": jnp.arange(20_000.0), "b": jnp.ones((3, 2))}}
PENDING = [{"step": 1.0}]


def save(folder: pathlib.Path, *steps: int) -> None:
    checkpoints = Checkpoints(folder)
    for step in steps:
        checkpoints.save(step, STATE, PENDING)
    checkpoints.close()


def restore(folder: pathlib.Path):
    checkpoints = Checkpoints(folder)
    try:
        return checkpoints.restore(STATE)
    finally:
        checkpoints.close()


def assert_is_state(state) -> None:
    jax.tree.map(np.testing.assert_array_equal, state, STATE)


NAMES = {
    "pattern": b"exp[1]*?[!a]{b,c}",
    "address": b"gs:",
    "backslash": b"a\\b",
    "spaces": b" a\tb\nc ",
    "url": b"#%20%zz?x=1&y;z|",
    "shell": b"$HOME~'\"`",
    "control": bytes(range(1, 32)) + b"\x7f",
    "unicode": "ünï 🙂\u202e".encode(),
    "not UTF-8": b"bad\xff\xfe",
}


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_under_a_path_of_any_characters(tmp_path, name):
    folder = tmp_path / os.fsdecode(NAMES[name]) / "run" / "checkpoints"
    save(folder, 1, 2)
    assert sorted(entry.name for entry in folder.iterdir()) == ["1", "2"]
    state, pending = restore(folder)
    assert_is_state(state)
    assert pending == PENDING
    np.testing.assert_array_equal(restore_trained(folder / "2")["a"], STATE["params"]["a"])


def test_best_checkpoint_under_a_pattern(tmp_path):
    best = BestCheckpoint(tmp_path / "exp[1]")
    best.save(3, STATE["params"])
    best.close()
    np.testing.assert_array_equal(best.restore(STATE["params"])["a"], STATE["params"]["a"])


def test_checkpoints_that_cannot_be_read_back_are_an_error_when_they_are_written(tmp_path, monkeypatch):
    """As on a system that has no plain path for a folder."""
    monkeypatch.setattr(orbax_module, "_OPEN_FOLDERS", tmp_path / "nowhere")
    save(tmp_path / "plain", 1)
    assert_is_state(restore(tmp_path / "plain")[0])
    checkpoints = Checkpoints(tmp_path / "exp[1]")
    checkpoints.save(1, STATE, PENDING)
    with pytest.raises(OSError, match=r"a checkpoint can't be written to .*exp\[1\]"):
        checkpoints.close()
    assert not (tmp_path / "exp[1]" / "1").exists()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    save(folder, 7)
    return folder


# names with random digits stand for the file of that kind
FILES = [
    "run/metadata",
    "unlogged/metadata",
    "state/_METADATA",
    "state/manifest.ocdbt",
    "state/d/*",
    "**/d/*",
]


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
@pytest.mark.parametrize("pattern", FILES)
def test_restore_names_a_damaged_file(saved, tmp_path, pattern, damage):
    shutil.copytree(saved, tmp_path / "c")
    path = max((tmp_path / "c" / "7").glob(pattern), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 16
        path.write_bytes(content)
    for read in (restore, lambda folder: restore_trained(folder / "7")):
        with pytest.raises(ValueError, match=f"step 7 .*{path.name} is|c/7 .*{path.name} is"):
            read(tmp_path / "c")


def test_restore_tells_every_flipped_bit(saved, tmp_path):
    """In any file: it is an error, or Orbax does not need the file."""
    shutil.copytree(saved, tmp_path / "c")
    generator = np.random.default_rng(0)
    files = sorted(path for path in (tmp_path / "c" / "7").rglob("*") if path.is_file())
    refused = 0
    for path in files:
        content = path.read_bytes()
        flipped = bytearray(content)
        flipped[generator.integers(len(content))] ^= 1 << generator.integers(8)
        path.write_bytes(flipped)
        try:
            assert_is_state(restore(tmp_path / "c")[0])
        except ValueError as error:
            refused += 1
            assert path.name in str(error) or path.name == CHECKSUMS
        path.write_bytes(content)
    assert refused >= len(files) - 2  # _CHECKPOINT_METADATA and commit_success.txt


def test_restore_reads_a_checkpoint_without_checksums(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "c")
    (tmp_path / "c" / "7" / CHECKSUMS).unlink()
    with pytest.warns(Notice, match="c/7 has no checksums, which older versions did not write"):
        assert_is_state(restore(tmp_path / "c")[0])


def test_checkpoints_remove_what_a_killed_run_left(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "c")
    shutil.copytree(saved / "7", tmp_path / "c" / "9.orbax-checkpoint-tmp")
    checkpoints = Checkpoints(tmp_path / "c")
    assert checkpoints.latest_step() == 7
    checkpoints.close()
    assert [entry.name for entry in (tmp_path / "c").iterdir()] == ["7"]


# A limit on the size of files, which a process can set for itself, fails as a full disk does.
FULL = """
import pathlib, resource, sys
sys.path[:0] = {paths!r}
from test_checkpoint import PENDING, STATE, Checkpoints, jax, np as numpy
checkpoints = Checkpoints(pathlib.Path({folder!r}))
checkpoints.save(1, STATE, PENDING)
checkpoints.close()
generator = numpy.random.default_rng(0)
larger = {{**STATE, "params": {{str(i): jax.device_put(generator.random(20_000)) for i in range(20)}}}}
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
checkpoints = Checkpoints(pathlib.Path({folder!r}))
try:
    checkpoints.save(2, larger, PENDING)
    checkpoints.close()
except OSError as error:
    print(error)
checkpoints.close()
"""


@pytest.mark.slow
def test_checkpoints_on_a_full_disk(tmp_path):
    """One error without Orbax's tracebacks; the last whole checkpoint stays, and nothing else."""
    here = os.path.dirname(__file__)
    folder = str(tmp_path / "c")
    script = FULL.format(paths=[here, os.path.dirname(here)], folder=folder)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout == (
        f"a checkpoint can't be written to {folder} (that of step 1 is whole): [Errno 27] File too large; "
        f"make room there, or choose another folder: '{folder}'\n"
    )
    assert_is_state(restore(tmp_path / "c")[0])  # after the next run has deleted what may be left
    assert [entry.name for entry in (tmp_path / "c").iterdir()] == ["1"]


def test_checkpoints_name_what_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(NotADirectoryError, match="file is a file; expected a folder"):
        Checkpoints(tmp_path / "file")
    with pytest.raises(NotADirectoryError, match="link is a link to nowhere, which does not exist"):
        Checkpoints(tmp_path / "link")
