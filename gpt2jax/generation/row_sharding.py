"""Rows over devices: which arrays of decoding are split by row, and the devices that share a batch.

Each device runs the program for its rows, as long as these need it: nothing is sent between devices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gpt2jax.generation.decoding import DecodeParams, DecodeState

_AXIS = "rows"
ROWS = PartitionSpec(_AXIS)


@functools.lru_cache
def row_mesh() -> Mesh | None:
    """Return the mesh of the local devices, as many as the largest power of two of them; None if there is one."""
    devices = jax.local_devices()
    count = 1 << (len(devices).bit_length() - 1)
    if count == 1:
        return None
    return jax.make_mesh((count,), (_AXIS,), axis_types=(AxisType.Auto,), devices=devices[:count])


def replicate(params: Any, mesh: Mesh) -> Any:
    """Copy weights to all devices of a mesh."""
    return jax.device_put(params, NamedSharding(mesh, PartitionSpec()))


def first_copy(params: Any) -> Any:
    """Return replicated weights as arrays of the first device, without copying them."""
    return jax.tree.map(lambda x: x.addressable_data(0), params)


def is_on_one_device(params: Any) -> bool:
    """Return whether no array is spread over several devices."""
    return all(len(leaf.sharding.device_set) == 1 for leaf in jax.tree.leaves(params))


def state_rows(state: DecodeState) -> Any:
    """Return how the arrays of a state are split."""
    return jax.tree.map(lambda x: ROWS if x.ndim else PartitionSpec(), state)


def settings_rows(settings: DecodeParams) -> Any:
    """Return how the arrays of settings are split: all by row, except what the rows share."""
    by_row = jax.tree.map(lambda _: ROWS, settings)
    shared = {name: PartitionSpec() for name in ("prompt_end", "stop_ids", "penalty_alpha")}
    return by_row._replace(**shared, penalties=by_row.penalties._replace(bad_words=PartitionSpec()))


def share_rows(mesh: Mesh, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Return a function that each device runs for its own rows."""
    # a loop's result differs between devices where its rows end at different steps: there is nothing to check
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def constrain_rows(tree: Any, mesh: Mesh | None) -> Any:
    """Split the arrays of a traced pytree by row; with one device it stays as it is."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, ROWS))
