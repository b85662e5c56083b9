"""Read the checkpoints of training runs, which Orbax wrote: a weight format like any other."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gpt2jax.model.gpt2 import Params
from gpt2jax.utils.json_files import read_json


def eval_params(state: Mapping[str, Any]) -> Params:
    """Return the parameters that are validated and returned: the moving average if the run keeps one."""
    return state["ema"] if "ema" in state else state["params"]


def is_checkpoint(folder: pathlib.Path) -> bool:
    """Return True if a folder looks like a whole checkpoint of a run."""
    return (folder / "state").is_dir() and (folder / "run" / "metadata").is_file()


def read_run(folder: pathlib.Path) -> dict[str, Any]:
    """Read the description of the run that a checkpoint belongs to."""
    return read_json(folder / "run" / "metadata", ("finetune", "base_model"))


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
    path = folder.absolute() / "state"
    # the handler instead of a checkpointer, which expects metadata that a manager does not write here
    handler: Any = ocp.StandardCheckpointHandler()
    with contextlib.closing(handler), readable_checkpoint(str(folder)):
        tree = handler.metadata(path).tree
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), tree)
        state = handler.restore(path, args=ocp.args.StandardRestore(shapes))
    return jax.tree.map(lambda leaf: jnp.array(jax.device_get(leaf)), eval_params(state))
