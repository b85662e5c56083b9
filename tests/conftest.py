"""Settings of the whole suite: fewer compiler parts and a compilation cache, since compiling is most of its time."""
# ruff: noqa: E402, jax reads its settings when it is imported

from __future__ import annotations

import gc
import importlib.metadata
import os
import pathlib

# XLA cuts each program into 32 parts for as many compiler threads; on few cores that only costs. Most of the suite's
# time is compiling: without optimization a training step takes 1 s of it instead of 8, and computes the same operations
_FLAGS = f"--xla_cpu_parallel_codegen_split_count={max(1, os.cpu_count() or 1)}"
if not os.environ.get("GPT2JAX_TEST_OPTIMIZED"):
    _FLAGS += " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones do not know the flag
        _FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", _FLAGS)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# where each operation stands in the source, which nothing here reads, takes 7 % of the time of tracing and compiling
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# one cache for all workers, which compile much the same; jax writes its entries without a lock
_TESTS = pathlib.Path(__file__).parent
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_TESTS.parent / ".pytest_cache" / "compiled"))
os.environ.setdefault("GPT2JAX_CACHE", str(_TESTS.parent / ".pytest_cache" / "gpt2jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax
import pytest
from jaxtyping import install_import_hook

# the shapes in the annotations of these modules are checked at every call; not those of fields, because jax also
# builds dataclasses of other leaves than arrays
_CHECKED = ["gpt2jax.ops", "gpt2jax.model"]
_CHECKED += ["gpt2jax.generation.sampling", "gpt2jax.generation.logits_processors"]
install_import_hook(_CHECKED, "shape_check.check_shapes")

# a worker holds gigabytes of programs and traces: searching them for garbage took 4 % of its time
gc.set_threshold(20_000, 50, 100)

# compiled programs are mapped into memory piece by piece, and a process may have 65,530 pieces (Linux's default)
_MAPS, _MANY = pathlib.Path("/proc/self/maps"), 40_000

# the files that take longest, most of them in few tests
_LONGEST = (
    "train/test_stopping.py",
    "train/test_resume.py",
    "generation/test_generate.py",
    "generation/test_compilations.py",
    "train/test_meshes.py",
    "train/test_step.py",
    "test_docs.py",
    "fuzz/test_fuzz.py",
    "study/test_study.py",
    "study/test_study_notebook.py",
    "benchmarks/test_gpu.py",
    "cli/test_plan.py",
    "weights/test_killed_save.py",
)


def pytest_addoption(parser):
    """Add the option that runs all tests."""
    parser.addoption("--thorough", action="store_true", help="run the tests that are marked thorough, too")


def pytest_report_header(config):
    """Say that tests are left out."""
    return None if config.option.thorough else "thorough tests are left out: --thorough runs them"


def pytest_configure(config):
    """Keep xdist from sorting files by their number of tests: those that take longest have few."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(config, items):
    """Leave out thorough tests; begin with the files that take longest, so that no worker waits for another."""
    if not config.option.thorough:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("thorough")])
        items[:] = [item for item in items if not item.get_closest_marker("thorough")]

    def rank(item):
        name = item.path.relative_to(_TESTS).as_posix()
        return _LONGEST.index(name) if name in _LONGEST else len(_LONGEST)

    items.sort(key=rank)


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
def small(model, tmp_path_factory) -> str:
    """Save a model whose programs take less time to compile than those of gpt2-mini; return its folder."""
    path = tmp_path_factory.mktemp("model") / "small"
    model.save(path)
    return str(path)


@pytest.fixture(scope="session")
def comparison(model, other_model):
    """Return a comparison of three tiny models."""
    from comparisons import make_comparison

    return make_comparison(model, other_model)
