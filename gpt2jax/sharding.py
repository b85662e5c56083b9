"""Several devices: the mesh, and the partition rule of each array.

A mesh has three axes. The rows of a batch are sharded over `data` and `fsdp`. Parameters and optimizer moments are
sharded over `fsdp` (each device holds a part of every matrix and fetches the rest layer by layer) and over `tensor`
(each device computes a part of the heads and of the MLP). Partition specs follow from parameter names; XLA inserts the
collectives.

Sources: Rajbhandari et al. 2020, "ZeRO"; Shoeybi et al. 2019, "Megatron-LM"; Xu et al. 2021, "GSPMD".
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gpt2jax.utils.validation import check, must_be, positive_int

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# the last axes of an array by the end of its name; leading axes (layers) are never sharded
AxisSpec = str | tuple[str, ...] | None
PARTITION_RULES: dict[str, tuple[AxisSpec, ...]] = {
    "embedding": (None, "fsdp"),  # [V or positions, D]
    "lm_head.kernel": (None, "fsdp"),  # [V, D]
    "c_attn.kernel": ("fsdp", "tensor"),  # [D, 3D]
    "c_fc.kernel": ("fsdp", "tensor"),  # [D, F]
    "c_proj.kernel": ("tensor", "fsdp"),  # [D or F, D]
    "c_attn.bias": (("tensor", "fsdp"),),
    "c_fc.bias": (("tensor", "fsdp"),),
    "bias": ("fsdp",),
    "scale": ("fsdp",),
    "magnitude": ("fsdp",),  # [out]
    "lora_a": ("fsdp", None),  # [in, r]
    "lora_b": (None, "fsdp"),  # [r, out]
}


def make_mesh(*, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Build a mesh of axes (data, fsdp, tensor) over `devices` (default: all of all processes).

    Args:
        fsdp: devices that share one copy of parameters and moments.
        tensor: devices that share the work of one row.
        devices: what to use; their number over fsdp * tensor is the number of data-parallel replicas.

    Raises:
        ValueError: the product of fsdp and tensor does not divide the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    for name, size in (("fsdp", fsdp), ("tensor", tensor)):
        check(name, size, positive_int)
    if len(devices) % (fsdp * tensor):
        legal = f"a multiple of fsdp={fsdp} times tensor={tensor}"
        raise ValueError(must_be("the number of devices", legal, len(devices)))
    shape = (len(devices) // (fsdp * tensor), fsdp, tensor)
    return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 3)


def num_batch_shards(mesh: Mesh | jax.sharding.AbstractMesh) -> int:
    """Return the number of shards of a batch's rows."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Return a `NamedSharding` for every leaf of parameters, adapters or a training state, by the leaf's name.

    Moments carry the names of their parameters and are sharded like them. An axis that the mesh does not divide is not
    sharded; a leaf without a rule (a step count, a loss scale) is replicated.
    """

    def leaf_sharding(path, leaf):
        return NamedSharding(mesh, _spec(path, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(leaf_sharding, tree)


def shard(tree: Any, mesh: Mesh) -> Any:
    """Shard arrays over the mesh; every process passes each array in full."""

    def place(leaf, sharding):
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        array = np.asarray(leaf)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(place, tree, shardings(tree, mesh))


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Shard the rows of a batch of arrays [B, ...] over the mesh; every process passes the full batch.

    Raises:
        ValueError: the number of shards does not divide B.
    """
    num_shards, sharding = num_batch_shards(mesh), NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    rows = next(iter(batch.values())).shape[0]
    if rows % num_shards:
        raise ValueError(must_be("the number of rows", f"a multiple of {num_shards}, that of shards", rows))
    return {
        name: jax.make_array_from_callback(array.shape, sharding, lambda index, array=array: array[index])
        for name, array in batch.items()
    }


def gather(tree: Any) -> Any:
    """Return the full arrays on this process's first device; all processes must call it."""
    device = jax.local_devices()[0]

    def gather_array(leaf):
        if not leaf.is_fully_addressable:
            from jax.experimental import multihost_utils

            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        return jax.device_put(leaf, device)

    return jax.tree.map(gather_array, tree)


def barrier(name: str) -> None:
    """Wait until all processes have called this with the same name."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def use_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """Return the context in which `constrain_batch` and `replicate` know the mesh; an empty one for None."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def num_batch_shards_in_scope() -> int:
    """Return the number of shards of a batch's rows inside `use_mesh`; 1 outside."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else num_batch_shards(mesh)


def constrain_batch(x: jax.Array, axis: int = 0) -> jax.Array:
    """Constrain activations to be sharded over their rows, inside `use_mesh`.

    Without this XLA may follow the sharding of the parameters: shard activations over D and gather all rows.
    """
    return _constrain(x, (*(None,) * axis, BATCH_AXES))


def constrain_embedding(x: jax.Array) -> jax.Array:
    """Constrain embeddings [B, T, D] inside `use_mesh`: rows sharded over `data`, D over `fsdp`.

    This is the step between a table sharded over D and activations sharded over rows: XLA reshards one axis at a time
    well, but gathers the full array to reshard both at once.
    """
    mesh = jax.sharding.get_abstract_mesh()
    even = not mesh.empty and x.shape[-1] % mesh.shape["fsdp"] == 0
    return _constrain(x, ("data", *(None,) * (x.ndim - 2), "fsdp")) if even else x


def constrain_params(tree: Any) -> Any:
    """Constrain parameters, gradients or a training state to `shardings`, inside `use_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree

    def constrain(path, leaf):
        return jax.lax.with_sharding_constraint(leaf, _spec(path, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(constrain, tree)


def replicate(x: jax.Array) -> jax.Array:
    """Constrain a parameter to be replicated inside `use_mesh`: fetched once, before a loop that reads it often."""
    return _constrain(x, ())


def _constrain(x: jax.Array, spec: tuple[Any, ...]) -> jax.Array:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def _spec(
    path: Sequence[Any], shape: tuple[int, ...], mesh: Mesh | jax.sharding.AbstractMesh
) -> PartitionSpec:
    """Return the partition spec of an array of this shape at this path of a tree."""
    names = _names(path)
    rule = PARTITION_RULES.get(".".join(names[-2:])) or PARTITION_RULES.get(names[-1] if names else "")
    if rule is None or len(shape) < len(rule):
        return PartitionSpec()
    leading = (None,) * (len(shape) - len(rule))
    specs: list[AxisSpec] = [*leading]
    for spec, size in zip(rule, shape[len(leading) :], strict=True):
        named = (spec,) if isinstance(spec, str) else spec or ()
        axes = tuple(axis for axis in named if mesh.shape[axis] > 1)
        num_shards = math.prod(mesh.shape[axis] for axis in axes)
        specs.append(None if num_shards == 1 or size % num_shards else axes[0] if len(axes) == 1 else axes)
    while specs and specs[-1] is None:  # as XLA spells the same spec: another spelling would compile again
        specs.pop()
    return PartitionSpec(*specs)


def _names(path: Sequence[Any]) -> list[str]:
    """Return the dict keys of a tree path; tuple and attribute entries (optax states, int8 kernels) are skipped."""
    return [str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey)]
