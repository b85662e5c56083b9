"""Accelerators by name: memory and peak speed from their makers' data sheets, and descriptions to compile for."""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any

from gpt2jax.utils.validation import unknown_name

GB = 10**9


@dataclasses.dataclass(frozen=True)
class Device:
    """One kind of accelerator.

    Attributes:
        name: as a user types it.
        title: as its maker writes it.
        backend: jax's name of its platform.
        memory: bytes.
        flops: peak FLOP/s of dense matrix products by dtype of their operands.
        topologies: number of devices to the name of a slice of so many, where XLA can compile for it without one.
    """

    name: str
    title: str
    backend: str
    memory: int
    flops: dict[str, float]
    topologies: dict[int, str] = dataclasses.field(default_factory=dict)


def _peaks(half: float, single: float) -> dict[str, float]:
    """Return the peaks by dtype, given in TFLOP/s for both 16-bit types and for float32."""
    return {"bfloat16": half * 1e12, "float16": half * 1e12, "float32": single * 1e12}


# hosts x processes x GPUs
_H100S = {count: f"1x1x{count}" for count in (1, 2, 4, 8)}

# sources: the makers' data sheets; float32 without TF32, on a TPU as six passes of bfloat16
DEVICES = {
    device.name: device
    for device in (
        Device("h100", "NVIDIA H100 SXM 80 GB", "gpu", 80 * GB, _peaks(989, 67), _H100S),
        Device("a100", "NVIDIA A100 80 GB", "gpu", 80 * GB, _peaks(312, 19.5)),
        Device("a100-40", "NVIDIA A100 40 GB", "gpu", 40 * GB, _peaks(312, 19.5)),
        Device("l4", "NVIDIA L4", "gpu", 24 * GB, _peaks(121, 30)),
        Device("rtx4090", "NVIDIA GeForce RTX 4090", "gpu", 24 * GB, _peaks(165, 83)),
        Device("v5e", "TPU v5e", "tpu", 16 * GB, _peaks(197, 33), {1: "v5e:1x1", 4: "v5e:2x2", 8: "v5e:2x4"}),
        Device(
            "v6e", "TPU v6e", "tpu", 32 * GB, _peaks(918, 153), {1: "v6e:1x1", 4: "v6e:2x2", 8: "v6e:2x4"}
        ),
    )
}

# cudaGetDeviceProperties of the GPU to compile for, in XLA's text format
_H100 = """gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84942979072
}
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 9 }
"""


def find_device(name: str) -> Device:
    """Return the device of that name.

    Raises:
        ValueError: it is not known; gives the nearest known one.
    """
    if name not in DEVICES:
        raise ValueError(unknown_name("device", name, DEVICES))
    return DEVICES[name]


def topology_devices(device: Device, count: int) -> list[Any]:
    """Return jax devices to compile for on a machine without them.

    Raises:
        LookupError: there is no description of so many of them, or jax's plugin for them is not installed; says what
            to install.
    """
    if count not in device.topologies:
        counts = ", ".join(map(str, device.topologies)) or "none"
        raise LookupError(f"XLA has no description of {count} x {device.name} here; described: {counts}")
    try:
        return list(_describe(device, device.topologies[count]))
    except (ImportError, RuntimeError, NotImplementedError, ValueError) as error:
        extra = "cuda" if device.backend == "gpu" else "tpu"
        raise LookupError(
            f'compiling for {device.name} needs pip install "gpt2jax[{extra}]"; {error}'
        ) from None


def _describe(device: Device, topology: str) -> Any:
    from jax.experimental import topologies

    if device.backend == "gpu":
        describe = functools.partial(
            topologies.get_topology_desc, platform="cuda", target_config=_H100, topology=topology
        )
        try:
            return describe().devices
        except Exception:  # jax registers its CUDA plugin only on a machine with a GPU
            _register_cuda()
            return describe().devices
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # only a TPU machine has a metadata server to ask
    bounds = tuple(int(size) for size in topology.partition(":")[2].split("x"))
    return topologies.get_topology_desc(
        platform="tpu",
        topology_name=topology,
        chip_config_name="default",
        chips_per_host_bounds=(*bounds, 1)[:3],
        num_slices=1,
        wrap=(False, False, False),
    ).devices


def _register_cuda() -> None:
    """Register jax's CUDA plugin on a machine without a GPU."""
    import contextlib

    import jax_plugins.xla_cuda12 as plugin  # pyright: ignore[reportMissingImports]

    with contextlib.suppress(Exception):  # already registered
        plugin.initialize()
