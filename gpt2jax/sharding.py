"""Several devices: a mesh, and which array is cut along which of its axes.

A mesh has three axes. The rows of a batch are cut over `data` and `fsdp`. Parameters and optimizer moments are
cut over `fsdp` (each device holds a share of every matrix and fetches the rest layer by layer) and over `tensor`
(each device computes a share of the heads and of the mlp). What an array's role is, its name in the parameter
dict says; XLA derives all communication from the cuts, none of it is written by hand.

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

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# the last axes of an array by its role; leading axes (layers) are never cut
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
    """A mesh of axes (data, fsdp, tensor) over `devices` (default: all of all processes).

    Args:
        fsdp: devices that share one copy of parameters and moments.
        tensor: devices that share the work of one row.
        devices: what to use; what fsdp and tensor leave over is data parallel.

    Raises:
        ValueError: the devices can't be divided so.
    """
    devices = list(jax.devices() if devices is None else devices)
    for name, size in (("fsdp", fsdp), ("tensor", tensor)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}={size!r} must be a positive whole number of devices")
    if len(devices) % (fsdp * tensor):
        raise ValueError(
            f"{len(devices)} devices can't be divided into fsdp={fsdp} times tensor={tensor}: the product must "
            f"divide the number of devices"
        )
    shape = (len(devices) // (fsdp * tensor), fsdp, tensor)
    return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 3)


def num_batch_shards(mesh: Mesh) -> int:
    """In how many parts the rows of a batch are cut."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A `NamedSharding` for every leaf of parameters, adapters or a training state, by the leaf's role.

    Moments carry the names of their parameters and are cut as these are. An axis that the mesh does not divide
    is not cut; nor is a leaf of unknown role (a step count, a loss scale).
    """

    def leaf_sharding(path, leaf):
        return NamedSharding(mesh, _spec(path, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(leaf_sharding, tree)


def shard(tree: Any, mesh: Mesh) -> Any:
    """The same arrays, cut over the mesh; every process gives the whole of each."""

    def place(leaf, sharding):
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        array = np.asarray(leaf)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(place, tree, shardings(tree, mesh))


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """A batch of arrays [B, ...] with its rows cut over the mesh; every process gives the whole batch.

    Raises:
        ValueError: the rows can't be divided among the devices.
    """
    ways, sharding = num_batch_shards(mesh), NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    rows = next(iter(batch.values())).shape[0]
    if rows % ways:
        raise ValueError(f"a batch of {rows} rows can't be divided among {ways} devices")
    return {
        name: jax.make_array_from_callback(array.shape, sharding, lambda index, array=array: array[index])
        for name, array in batch.items()
    }


def gather(tree: Any) -> Any:
    """The whole arrays on this process's first device; all processes must call it."""
    device = jax.local_devices()[0]

    def whole_array(leaf):
        if not leaf.is_fully_addressable:
            from jax.experimental import multihost_utils

            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        return jax.device_put(leaf, device)

    return jax.tree.map(whole_array, tree)


def barrier(name: str) -> None:
    """Of several processes: goes on when all have come here, each with the same name."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def use_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """The context in which `constrain_batch` and `replicate` know the mesh; none for one device."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def num_batch_shards_in_scope() -> int:
    """Inside `use_mesh`: in how many parts the rows of a batch are cut; 1 outside."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]


def constrain_batch(x: jax.Array, axis: int = 0) -> jax.Array:
    """Inside `use_mesh`: keeps activations cut along their rows, whatever the parameters' cuts suggest.

    Without this XLA may as well cut activations along D and gather the rows of all devices.
    """
    return _constrain(x, (*(None,) * axis, BATCH_AXES))


def constrain_embedding(x: jax.Array) -> jax.Array:
    """Inside `use_mesh`: what an embedding table gives, [B, T, D], its rows cut over `data` and D over `fsdp`.

    The step between a table that is cut along D and activations that are cut along rows: XLA changes one cut at a
    time well, and both at once by gathering the whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    even = not mesh.empty and x.shape[-1] % mesh.shape["fsdp"] == 0
    return _constrain(x, ("data", *(None,) * (x.ndim - 2), "fsdp")) if even else x


def constrain_params(tree: Any) -> Any:
    """Inside `use_mesh`: parameters, gradients or a training state cut as `shardings` says."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree

    def cut(path, leaf):
        return jax.lax.with_sharding_constraint(leaf, _spec(path, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(cut, tree)


def replicate(x: jax.Array) -> jax.Array:
    """Inside `use_mesh`: a parameter fetched from all devices once, ahead of a loop that reads it often."""
    return _constrain(x, ())


def _constrain(x: jax.Array, spec: tuple[Any, ...]) -> jax.Array:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def _spec(
    path: Sequence[Any], shape: tuple[int, ...], mesh: Mesh | jax.sharding.AbstractMesh
) -> PartitionSpec:
    """How the array of this shape at this place of a tree is cut."""
    names = _names(path)
    role = PARTITION_RULES.get(".".join(names[-2:])) or PARTITION_RULES.get(names[-1] if names else "")
    if role is None or len(shape) < len(role):
        return PartitionSpec()
    leading = (None,) * (len(shape) - len(role))
    cuts: list[AxisSpec] = [*leading]
    for cut, size in zip(role, shape[len(leading) :], strict=True):
        named = (cut,) if isinstance(cut, str) else cut or ()
        axes = tuple(axis for axis in named if mesh.shape[axis] > 1)
        ways = math.prod(mesh.shape[axis] for axis in axes)
        cuts.append(None if ways == 1 or size % ways else axes[0] if len(axes) == 1 else axes)
    while cuts and cuts[-1] is None:  # as XLA spells the same cut: another spelling would compile again
        cuts.pop()
    return PartitionSpec(*cuts)


def _names(path: Sequence[Any]) -> list[str]:
    """The dict keys of a tree path; optax wraps them in tuples and named tuples, which have no names of ours.

    Nor have the arrays of a rounded kernel: they go by its name.
    """
    return [str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey)]
