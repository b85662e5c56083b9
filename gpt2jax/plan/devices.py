"""Accelerators by name: memory and peak speed from their makers' data sheets, and descriptions to compile for."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import os
from typing import Any

from gpt2jax.ops.device import Device
from gpt2jax.utils.validation import unknown_name

GB = 10**9


@dataclasses.dataclass(frozen=True)
class CudaChip:
    """What XLA must know of an NVIDIA GPU to compile for it, as cudaGetDeviceProperties gives it.

    Attributes:
        compute_capability: (major, minor).
        cores: streaming multiprocessors; the next four are of one of them.
        lanes: float32 units.
        threads: most threads at once.
        shared_memory: bytes.
        shared_memory_of_block: bytes that one block can ask for.
        clock: GHz.
        l2_cache: bytes.
    """

    compute_capability: tuple[int, int]
    cores: int
    lanes: int
    threads: int
    shared_memory: int
    shared_memory_of_block: int
    clock: float
    l2_cache: int


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One kind of accelerator.

    Attributes:
        name: as a user types it.
        title: as its maker writes it.
        backend: jax's name of its platform.
        memory: bytes.
        bandwidth: of the memory, bytes a second.
        flops: peak FLOP/s of dense matrix products by dtype of their operands.
        topologies: number of devices to the name of a slice of so many, where XLA can compile for it without one.
        chip: of an NVIDIA GPU.
    """

    name: str
    title: str
    backend: str
    memory: int
    bandwidth: float
    flops: dict[str, float]
    topologies: dict[int, str]
    chip: CudaChip | None = None

    @property
    def facts(self) -> Device:
        """What the choices of a program for it follow from."""
        if self.chip is None:
            return Device(self.backend, None, self.memory, self.title)
        return Device("cuda", self.chip.compute_capability, self.memory, self.title)


def _peaks(half: float, single: float, *, bfloat16: float | None = None) -> dict[str, float]:
    """Return the peaks by dtype, given in TFLOP/s for both 16-bit types and for float32."""
    peaks = {"bfloat16": bfloat16 or half, "float16": half, "float32": single, "tensorfloat32": half / 3}
    return {dtype: peak * 1e12 for dtype, peak in peaks.items()}


# hosts x processes x GPUs
_GPUS = {count: f"1x1x{count}" for count in (1, 2, 4, 8)}
_KB, _MB = 2**10, 2**20
_TURING = CudaChip((7, 5), 40, 64, 1024, 64 * _KB, 64 * _KB, 1.59, 4 * _MB)
_VOLTA = CudaChip((7, 0), 80, 64, 2048, 96 * _KB, 96 * _KB, 1.53, 6 * _MB)
_AMPERE = CudaChip((8, 0), 108, 64, 2048, 164 * _KB, 163 * _KB, 1.41, 40 * _MB)
_L4 = CudaChip((8, 9), 58, 128, 1536, 100 * _KB, 99 * _KB, 2.04, 48 * _MB)
_ADA = CudaChip((8, 9), 128, 128, 1536, 100 * _KB, 99 * _KB, 2.52, 72 * _MB)
_HOPPER = CudaChip((9, 0), 132, 128, 2048, 228 * _KB, 227 * _KB, 1.98, 50 * _MB)


def _gpu(
    name: str, title: str, memory: float, bandwidth: float, flops: dict[str, float], chip: CudaChip
) -> Accelerator:
    """Return an NVIDIA GPU with so many GB, and GB a second."""
    has_tf32 = chip.compute_capability >= (8, 0)
    flops = flops | {"tensorfloat32": flops["float16"] / 2 if has_tf32 else flops["float32"]}
    return Accelerator(name, title, "gpu", int(memory * GB), bandwidth * GB, flops, _GPUS, chip)


# sources: the makers' data sheets; float32 without TF32, on a TPU as six passes of bfloat16, TF32 as three. GPUs before
# Ampere have no bfloat16 in their matrix units; a T4 lends 15 of its 16 GB
DEVICES = {
    device.name: device
    for device in (
        _gpu("t4", "NVIDIA T4", 15.6, 320, _peaks(65, 8.1, bfloat16=8.1), _TURING),
        _gpu("v100", "NVIDIA V100 SXM 16 GB", 16, 900, _peaks(125, 15.7, bfloat16=15.7), _VOLTA),
        _gpu("a100", "NVIDIA A100 80 GB", 80, 2039, _peaks(312, 19.5), _AMPERE),
        _gpu("a100-40", "NVIDIA A100 40 GB", 40, 1555, _peaks(312, 19.5), _AMPERE),
        _gpu("l4", "NVIDIA L4", 24, 300, _peaks(121, 30), _L4),
        _gpu("rtx4090", "NVIDIA GeForce RTX 4090", 24, 1008, _peaks(165, 83), _ADA),
        _gpu("h100", "NVIDIA H100 SXM 80 GB", 80, 3352, _peaks(989, 67), _HOPPER),
        _gpu("h200", "NVIDIA H200 SXM 141 GB", 141, 4800, _peaks(989, 67), _HOPPER),
        Accelerator(
            "v5e",
            "TPU v5e",
            "tpu",
            16 * GB,
            819e9,
            _peaks(197, 33),
            {1: "v5e:1x1", 4: "v5e:2x2", 8: "v5e:2x4"},
        ),
        Accelerator(
            "v6e",
            "TPU v6e",
            "tpu",
            32 * GB,
            1640e9,
            _peaks(918, 153),
            {1: "v6e:1x1", 4: "v6e:2x2", 8: "v6e:2x4"},
        ),
    )
}

CUDA_PLUGINS = ("xla_cuda13", "xla_cuda12")

# of the GPU to compile for, in XLA's text format; what is the same for all of them stands here
_TARGET = """gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  core_count: {chip.cores} fpus_per_core: {chip.lanes} clock_rate_ghz: {chip.clock}
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: {chip.threads}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {chip.shared_memory_of_block}
  shared_memory_per_core: {chip.shared_memory}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: {chip.l2_cache} device_memory_size: {device.memory}
}}
platform_name: "CUDA"
device_description_str: "{device.title}"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ {runtime} }}
"""


def find_device(name: str) -> Accelerator:
    """Return the device of that name.

    Raises:
        ValueError: it is not known; gives the nearest known one.
    """
    if name not in DEVICES:
        raise ValueError(unknown_name("device", name, DEVICES))
    return DEVICES[name]


def topology_devices(device: Accelerator, count: int) -> list[Any]:
    """Return jax devices to compile for on a machine without them.

    Raises:
        LookupError: there is no description of so many of them, or jax's plugin for them is not installed; says what
            to install.
    """
    if count not in device.topologies:
        counts = ", ".join(map(str, device.topologies))
        raise LookupError(f"XLA has no description of {count} x {device.name} here; described: {counts}")
    try:
        return list(_describe(device, device.topologies[count]))
    except (ImportError, RuntimeError, NotImplementedError, ValueError) as error:
        extra = "cuda" if device.backend == "gpu" else "tpu"
        raise LookupError(
            f'compiling for {device.name} needs pip install -e ".[{extra}]" in the clone; {error}'
        ) from None


def _describe(device: Accelerator, topology: str) -> Any:
    from jax.experimental import topologies

    if device.chip is not None:
        plugin = find_cuda_plugin()
        describe = functools.partial(
            topologies.get_topology_desc,
            platform="cuda",
            target_config=cuda_target(device, plugin),
            topology=topology,
        )
        try:
            return describe().devices
        except Exception:  # jax registers its CUDA plugin by itself only on a machine with a GPU
            with contextlib.suppress(Exception):  # already registered
                importlib.import_module(f"jax_plugins.{plugin}").initialize()
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


def cuda_target(device: Accelerator, plugin: str) -> str:
    """Return the description of a GPU that XLA compiles for, with the CUDA that jax's plugin brings."""
    assert device.chip is not None
    major, minor = device.chip.compute_capability
    runtime = "major: 13 minor: 0" if plugin == "xla_cuda13" else "major: 12 minor: 9"
    return _TARGET.format(
        device=device,
        chip=device.chip,
        major=major,
        minor=minor,
        bandwidth=int(device.bandwidth),
        runtime=runtime,
    )


def find_cuda_plugin() -> str:
    """Return the name of jax's CUDA plugin that is installed.

    Raises:
        ImportError: none is.
    """
    for name in CUDA_PLUGINS:
        with contextlib.suppress(ImportError):
            importlib.import_module(f"jax_plugins.{name}")
            return name
    raise ImportError(f"no module named {' or '.join(f'jax_plugins.{name}' for name in CUDA_PLUGINS)}")
