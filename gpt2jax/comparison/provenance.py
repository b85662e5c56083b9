"""What it takes to repeat a comparison: which models, which texts, which versions."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import gpt2jax
from gpt2jax.language_model import LanguageModel


def describe_model(model: LanguageModel) -> dict[str, Any]:
    """Where a model comes from, and what tells it from others."""
    return {
        "source": model.source,
        "parameters": model.num_parameters(),
        "adapter_rank": model.lora.rank if model.lora and model.adapters is not None else None,
        "fingerprint": params_fingerprint((model.params, model.adapters)),
    }


def params_fingerprint(params: Any) -> str:
    """SHA-256 (hex) of all arrays of a tree with their places, dtypes and shapes."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.ascontiguousarray(jax.device_get(leaf))
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)  # bytes, whatever the dtype
    return digest.hexdigest()


def data_fingerprint(texts: Sequence[Any]) -> str:
    """SHA-256 (hex) of the texts, each behind its length, so that where one ends counts too."""
    digest = hashlib.sha256()
    for text in texts:
        add_text(digest, text)
    return digest.hexdigest()


def add_text(digest: Any, text: Any) -> None:
    """Feeds one text, a string or token ids, to the hash of `data_fingerprint`."""
    if isinstance(text, str):
        data = text.encode("utf-8", "surrogatepass")
    else:
        data = np.asarray(text, "<i8").tobytes()
    digest.update(f"{isinstance(text, str):d} {len(data)}\n".encode())
    digest.update(data)


def versions() -> dict[str, str]:
    """Of Python and the packages that compute, and the machine."""
    device = jax.devices()[0]
    packages = {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy")}
    return {
        "gpt2jax": gpt2jax.__version__,
        "python": platform.python_version(),
        **packages,
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
    }


def processor() -> str:
    """Name of the processor, and how many of its cores this process may use."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # Linux alone has the file
        found = re.search(r"^model name\s*: (.+)$", pathlib.Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        name = found[1] if found else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"
