"""The start of the program: compiler settings, cache and huge pages, which must come before jax is imported."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import platform
import sys
from pathlib import Path

from gpt2jax.utils.cache_folder import cache_folder

_PARTS = "xla_cpu_parallel_codegen_split_count"
_HUGE_PAGES = "glibc.malloc.hugetlb"
# of compiled programs, some hundred commands' worth; jax deletes those that were not used for longest
_CACHE_BYTES = 1 << 30


def set_compiler_parts() -> None:
    """Let XLA:CPU split a program into as many parts as there are cores; call it before jax is imported."""
    # XLA's default of 32 parts, one for each compiler thread, doubles the time to compile on 2 cores
    flags = os.environ.get("XLA_FLAGS", "")
    if _PARTS not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --{_PARTS}={min(32, os.cpu_count() or 1)}".strip()


def keep_compiled_programs() -> None:
    """Let jax keep compiled programs in the user's cache folder; call it before jax is imported.

    What the user says by jax's own variables counts: JAX_ENABLE_COMPILATION_CACHE=false keeps none, and
    JAX_COMPILATION_CACHE_DIR names another folder.
    """
    # jax bounds a folder only with the help of filelock
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or not importlib.util.find_spec("filelock"):
        return
    folder = cache_folder(f"programs/{_processor()}")
    if folder is None:
        return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(_CACHE_BYTES))
    # a short text takes dozens of programs, most of which compile within the second that is jax's limit
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


def _processor() -> str:
    """Return a name for the kind of processor: a program for one may not run on another that shares the folder."""
    described = [platform.machine()]
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        described += [line for line in lines if line.startswith(("flags", "Features"))][:1]
    return hashlib.sha256("".join(described).encode()).hexdigest()[:12]


def restart_in_huge_pages() -> None:
    """Start this process anew with huge pages, on a system that gives them on request; else do nothing."""
    # A training step on a CPU takes gigabytes from the system and gives them back each time. Pages of 2 MiB instead
    # of 4 KiB make that ten times cheaper, which saves a sixth of the step. glibc reads the setting only at the start
    # of a program, so the process replaces itself.
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if _HUGE_PAGES not in tunables and _has_huge_pages_on_request():
        settings = ":".join(filter(None, (tunables, f"{_HUGE_PAGES}=1")))
        arguments = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, arguments, os.environ | {"GLIBC_TUNABLES": settings})


def _has_huge_pages_on_request() -> bool:
    """Return whether the system has huge pages for programs that ask, and an allocator that can be told to."""
    # systems other than Linux, and other C libraries, raise one of these
    with contextlib.suppress(OSError, ValueError, AttributeError):
        library = os.confstr("CS_GNU_LIBC_VERSION") or ""  # "glibc 2.36"
        version = tuple(map(int, library.removeprefix("glibc ").split(".")))
        on_request = "[madvise]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
        return version >= (2, 35) and on_request
    return False
