"""The checkpoints of training runs, which Orbax writes and reads: a weight format like any other.

Orbax takes some paths for a pattern, an address or text, and stores arrays without checksums. Here it gets a path that
it cannot misread, and each checkpoint gets a file with the size and the CRC-32 of every other file in it.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from types import NoneType
from typing import Any

import jax
import jax.numpy as jnp

from gpt2jax.model.gpt2 import Params
from gpt2jax.utils.atomic_io import atomic_write, sync_folder
from gpt2jax.utils.checksums import file_crc32
from gpt2jax.utils.json_files import read_json
from gpt2jax.utils.notices import notice

CHECKSUMS = "checksums.json"  # file of a checkpoint, written last
# Orbax writes these two after the checksums; reading a checkpoint needs neither
_WITHOUT_CHECKSUM = ("_CHECKPOINT_METADATA", "commit_success.txt")
_OPEN_FOLDERS = pathlib.Path("/proc/self/fd")  # Linux: each folder that the process has open, by its number


def eval_params(state: Mapping[str, Any]) -> Params:
    """Return the parameters that are validated and returned: the moving average if the run keeps one."""
    return state["ema"] if "ema" in state else state["params"]


def is_checkpoint(folder: pathlib.Path) -> bool:
    """Return True if a folder looks like a whole checkpoint of a run."""
    return (folder / "state").is_dir() and (folder / "run" / "metadata").is_file()


def read_run(folder: pathlib.Path) -> dict[str, Any]:
    """Read the description of the run that a checkpoint belongs to."""
    kinds = {"finetune": dict, "base_model": (str, NoneType)}
    return read_json(folder / "run" / "metadata", kinds, {"model_config": dict, "base_sha256": str})


@contextlib.contextmanager
def plain_path(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Give another path of a folder, of plain characters only, for Orbax.

    Orbax globs its own path and fails with "[" and "\\" in it. TensorStore fails with "://" and with names that are
    not UTF-8. Orbax writes the path into its files. A system without such paths gets `folder` itself: a checkpoint
    that can't be read there is an error when it is sealed.
    """
    if not _OPEN_FOLDERS.is_dir():
        yield folder.absolute()
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield _OPEN_FOLDERS / str(handle)
    finally:
        os.close(handle)


def seal_checkpoint(folder: pathlib.Path) -> None:
    """Verify that the arrays of a new checkpoint can be found, and write its checksums, all of it to the disk.

    Raises:
        ValueError: arrays are missing.
    """
    import orbax.checkpoint as ocp

    for item in folder.iterdir():
        if (item / "_METADATA").is_file():
            handler: Any = ocp.StandardCheckpointHandler()
            with contextlib.closing(handler):
                handler.metadata(item)  # opens each array
    sums = {}
    for place, _, names in os.walk(folder):
        for path in (pathlib.Path(place, name) for name in names):
            name = path.relative_to(folder).as_posix()
            if name not in _WITHOUT_CHECKSUM:
                sums[name] = file_crc32(path, sync=True)
        sync_folder(place)
    with atomic_write(folder / CHECKSUMS) as file:
        json.dump({"crc32": {name: sums[name] for name in sorted(sums)}}, file, indent=1)


def check_checkpoint(folder: pathlib.Path) -> None:
    """Compare the files of a checkpoint with their checksums.

    A checkpoint without them, which an older version wrote, gives a notice.

    Raises:
        ValueError: a file is missing or damaged; the message names it.
    """
    if not (folder / CHECKSUMS).exists():
        notice(f"{folder} has no checksums, which older versions did not write: damage can't be told")
        return
    sums = read_json(folder / CHECKSUMS, {"crc32": dict})["crc32"]
    for name, expected in sums.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        size, crc = file_crc32(path)
        if [size, crc] != expected:
            raise ValueError(
                f"{path} is damaged: it must have [size, checksum] {expected}, got {[size, crc]}"
            )


@contextlib.contextmanager
def readable_checkpoint(name: str, advice: str = "") -> Iterator[None]:
    """Turn any error of Orbax in the block into a ValueError that names the checkpoint."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"the checkpoint {name} can't be read: {error!s:.300}{advice}") from error


def restore_trained(folder: pathlib.Path) -> Params:
    """Read parameters or adapters of one checkpoint, or their moving average; not committed to a device."""
    import orbax.checkpoint as ocp

    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    # the handler instead of a checkpointer, which expects metadata that a manager does not write here
    handler: Any = ocp.StandardCheckpointHandler()
    with contextlib.closing(handler), readable_checkpoint(str(folder)), plain_path(folder) as path:
        check_checkpoint(folder)
        tree = handler.metadata(path / "state").tree
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), tree)
        state = handler.restore(path / "state", args=ocp.args.StandardRestore(shapes))
    return jax.tree.map(lambda leaf: jnp.array(jax.device_get(leaf)), eval_params(state))
