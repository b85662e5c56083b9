"""Describes models, versions and the machine, so that a comparison can be repeated."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import pathlib
import platform
import re
from typing import Any

import jax

from gpt2jax.language_model import LanguageModel
from gpt2jax.train.config import FinetuneConfig
from gpt2jax.utils.fingerprint import params_fingerprint


def describe_model(model: LanguageModel) -> dict[str, Any]:
    """Return where a model comes from, and the fingerprint that identifies it."""
    return {
        "source": model.source,
        "parameters": model.num_parameters(),
        "adapter_rank": model.lora.rank if model.lora and model.adapters is not None else None,
        "fingerprint": params_fingerprint((model.params, model.adapters)),
    }


def describe_training(config: FinetuneConfig) -> dict[str, Any]:
    """Return the settings that the result of a training follows from."""
    settings = dataclasses.asdict(config)
    del settings["token_cache"]
    return settings


def versions() -> dict[str, str]:
    """Return the versions of Python and the packages that compute, and the machine."""
    device = jax.devices()[0]
    packages = {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy")}
    return {
        "gpt2jax": importlib.metadata.version("gpt2jax"),
        "python": platform.python_version(),
        **packages,
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
    }


def processor() -> str:
    """Return the name of the processor, and how many of its cores this process may use."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # only Linux has the file
        found = re.search(r"^model name\s*: (.+)$", pathlib.Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        name = found[1] if found else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"
