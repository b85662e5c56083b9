"""Settings of the whole suite: fewer compiler parts and a compilation cache, since compiling is most of its time."""

from __future__ import annotations

import os
import pathlib

# XLA cuts each program into 32 parts for as many compiler threads; on few cores that only costs
os.environ.setdefault("XLA_FLAGS", f"--xla_cpu_parallel_codegen_split_count={max(1, os.cpu_count() or 1)}")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# a cache for each process: jax does not write its entries atomically
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(
        pathlib.Path(__file__).parents[1]
        / ".pytest_cache"
        / "compiled"
        / os.environ.get("PYTEST_XDIST_WORKER", "main")
    ),
)
os.environ.setdefault("GPT2JAX_CACHE", str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / "gpt2jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import jax
import pytest
from jaxtyping import install_import_hook

# the shapes in the annotations of these modules are checked at every call; not those of fields, because jax also
# builds dataclasses of other leaves than arrays
_CHECKED = ["gpt2jax.ops", "gpt2jax.model"]
_CHECKED += ["gpt2jax.generation.sampling", "gpt2jax.generation.logits_processors"]
install_import_hook(_CHECKED, "shape_check.check_shapes")

# compiled programs are mapped into memory piece by piece, and a process may have 65,530 pieces (Linux's default)
_MAPS, _MANY = pathlib.Path("/proc/self/maps"), 40_000


@pytest.fixture(autouse=True, scope="module")
def drop_programs_when_many():
    """Free the compiled programs of earlier files before the system refuses to map more."""
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > _MANY:
        jax.clear_caches()


@pytest.fixture(scope="session")
def model():
    """Return a tiny random model."""
    from tiny_models import random_model

    return random_model(0)


@pytest.fixture(scope="session")
def other_model():
    """Return another tiny random model."""
    from tiny_models import random_model

    return random_model(1)


@pytest.fixture(scope="session")
def comparison(model, other_model):
    """Return a comparison of three tiny models."""
    from comparisons import make_comparison

    return make_comparison(model, other_model)
