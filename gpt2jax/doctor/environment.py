"""Versions, devices and caches of this installation."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from gpt2jax.doctor.findings import Finding, Status
from gpt2jax.utils.home_folder import abbreviate_home

_SHOWN = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_PLUGIN = re.compile(r"jax[-_](cuda\d+|rocm\d+)[-_]p(jrt|lugin)|libtpu")

# versions that do not work together, by name; "failed" if they cannot be used, "note" if they can with care
_KNOWN_PROBLEMS: tuple[tuple[dict[str, str], Status, str], ...] = (
    (
        {"flax": ">=0.12.9,<=0.12.11", "jax": ">=0.11.1"},
        "failed",
        "flax 0.12.9 to 0.12.11 do not import with this jax; install flax 0.12.12 or later",
    ),
    (
        {"orbax-checkpoint": "<0.11.17", "jax": ">=0.10.2"},
        "failed",
        "orbax-checkpoint before 0.11.17 does not import with this jax",
    ),
    (
        {"jaxlib": "==0.10.2"},
        "note",
        "on a CPU a product of a matrix with a vector under vmap, then summed, can be silently wrong (jax issue "
        "39103). gpt2jax has no such product; your own code may",
    ),
    (
        {"jaxlib": "==0.11.2"},
        "note",
        "on a CPU gradients of a product with a broadcast vector that is multiplied and summed can be wrong",
    ),
)


def check_versions() -> Iterator[Finding]:
    """Show versions, hold them against what gpt2jax declares, and name known problems."""
    yield Finding("Python", "ok", f"{platform.python_version()} on {platform.platform()}")
    plugins = sorted(
        name for found in importlib.metadata.distributions() if _PLUGIN.fullmatch(name := found.name or "")
    )
    versions = {name: version for name in (*_SHOWN, *plugins) if (version := _version(name))}
    yield Finding("packages", "ok", ", ".join(f"{name} {version}" for name, version in versions.items()))
    try:
        declared = importlib.metadata.requires("gpt2jax") or ()
    except importlib.metadata.PackageNotFoundError:  # a folder on the path
        declared = ()
        yield Finding("gpt2jax", "note", "is not installed, so what it needs was not checked")
    for requirement in map(Requirement, declared):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            version = _version(requirement.name)
            if version is None or not requirement.specifier.contains(version, prereleases=True):
                text = f"must be {requirement.specifier}, got {version or 'none'}"
                yield Finding(requirement.name, "failed", f"{text}; pip install -U gpt2jax")
    for name in plugins:
        # jax leaves out plugins of NVIDIA GPUs of another version; those of AMD have releases of their own
        if "cuda" in name and Version(versions[name]).release != Version(versions.get("jaxlib", "0")).release:
            text = f"must have jaxlib's version {versions.get('jaxlib')}, got {versions[name]}"
            yield Finding(name, "failed", f"{text}; jax does not use it")
    yield from find_known_problems(versions)


def find_known_problems(versions: dict[str, str]) -> Iterator[Finding]:
    """Yield a finding for each set of versions that is known not to work."""
    for problem, status, text in _KNOWN_PROBLEMS:
        if all(
            name in versions and SpecifierSet(legal).contains(versions[name])
            for name, legal in problem.items()
        ):
            yield Finding(" with ".join(f"{name} {versions[name]}" for name in problem), status, text)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_devices() -> Iterator[Finding]:
    """Show the devices, and what is chosen for the first one and why."""
    import jax

    from gpt2jax.generation.cached_model import decoding_precision
    from gpt2jax.ops.device import Device, find_backend_problem
    from gpt2jax.ops.precision import Precision

    if problem := find_backend_problem():
        yield Finding("devices", "failed", problem)
        return
    for number, device in enumerate(jax.local_devices()):
        facts = Device.of(device)
        memory = f"{facts.memory_bytes / 1e9:.1f} GB" if facts.memory_bytes else None
        capability = ".".join(map(str, facts.compute_capability)) if facts.compute_capability else None
        name = f"{os.cpu_count()} cores" if facts.platform == "cpu" else facts.name
        parts = (facts.platform, name, memory, capability and f"compute capability {capability}")
        yield Finding(f"device {number}", "ok", ", ".join(part for part in parts if part))
    device = Device.of()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reason below says the same
        for dtype in ("float32", "bfloat16"):
            described = Precision.for_device(dtype, device).execution.describe()
            works, reason = _explain_attention(device, dtype)
            yield Finding(f"training in {dtype}", "ok" if works else "note", f"{described}; {reason}")
        yield Finding(
            "decoding", "ok", f"weights in {decoding_precision().compute_dtype} unless --dtype says otherwise"
        )


def _explain_attention(device: object, dtype: str) -> tuple[bool, str]:
    """Return whether the kernel of attention is the one that the device should have, and why it was chosen."""
    from gpt2jax.ops.device import Device, try_cudnn_attention, try_flash_attention

    assert isinstance(device, Device)
    if device.platform == "cpu":
        return True, "blockwise because the scores of a block fit the CPU's caches"
    if device.platform != "cuda":
        return True, "blockwise because cuDNN's kernel is for NVIDIA's GPUs"
    if dtype == "float32":
        return True, "blockwise because cuDNN's kernel is for 16 bits"
    if device.compute_capability is None or device.compute_capability < (8, 0):
        return True, "blockwise because cuDNN's kernel needs compute capability 8.0"
    kernels = {"cuDNN's": try_cudnn_attention(dtype), "the Pallas": try_flash_attention(dtype)}
    failed = [
        f"{name} kernel does not work here: {why}" for name, (works, why) in kernels.items() if not works
    ]
    return not failed, "; ".join(failed) or "cuDNN's and the Pallas kernels were tried and work"


def check_caches() -> Iterator[Finding]:
    """Show where compiled programs, token ids and files of the hub are kept, and how much they take."""
    import jax
    from huggingface_hub import constants

    from gpt2jax.data.token_cache import default_cache

    settings: Any = jax.config  # whose attributes jax adds as it runs
    programs = settings.jax_compilation_cache_dir if settings.jax_enable_compilation_cache else None
    places = {"compiled programs": programs, "token ids": default_cache(), "hub": constants.HF_HUB_CACHE}
    for name, place in places.items():
        subject = f"cache of {name}"
        if place is None:
            yield Finding(subject, "note", "none: everything is made anew in each run")
            continue
        size, files = _measure(Path(place))
        existing = next(
            folder for folder in (Path(place), *Path(place).absolute().parents) if folder.exists()
        )
        can_write = existing.is_dir() and os.access(existing, os.W_OK)
        text = f"{abbreviate_home(str(place))}: {size / 1e6:,.1f} MB in {files:,} files"
        yield Finding(
            subject, "ok" if can_write else "note", text if can_write else f"{text}; can't be written to"
        )


def _measure(folder: Path) -> tuple[int, int]:
    """Return bytes and number of the files of a folder; a file that a link names counts once."""
    sizes = {}
    for place, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(place, name)
            if os.path.isfile(path) and not os.path.islink(path):
                sizes[path] = os.path.getsize(path)
    return sum(sizes.values()), len(sizes)
