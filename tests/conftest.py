"""Settings of the whole suite: fewer compiler parts and a compilation cache, since compiling is most of its time."""

from __future__ import annotations

import os
import pathlib

# XLA cuts each program into 32 parts for as many compiler threads; on few cores that only costs
os.environ.setdefault("XLA_FLAGS", f"--xla_cpu_parallel_codegen_split_count={max(1, os.cpu_count() or 1)}")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / "compiled")
)
os.environ.setdefault("GPT2JAX_CACHE", str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / "gpt2jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
