"""The start of the program."""

from __future__ import annotations

import os
import sys

import pytest

from gpt2jax.cli import _launcher


@pytest.mark.parametrize(("flags", "kept"), [("", ""), ("--a=1", "--a=1 ")])
def test_set_compiler_parts_adds_a_flag_once(monkeypatch, flags, kept):
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    for _ in range(2):
        _launcher.set_compiler_parts()
        assert os.environ["XLA_FLAGS"] == f"{kept}--xla_cpu_parallel_codegen_split_count=3"


def test_restart_in_huge_pages_replaces_the_process_once(monkeypatch):
    calls = []
    monkeypatch.setattr(os, "execve", lambda *call: calls.append(call))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "gpt2jax", "finetune"])
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.other=1")
    monkeypatch.setattr(_launcher, "_has_huge_pages_on_request", lambda: False)
    _launcher.restart_in_huge_pages()
    assert calls == []
    monkeypatch.setattr(_launcher, "_has_huge_pages_on_request", lambda: True)
    _launcher.restart_in_huge_pages()
    ((program, arguments, environment),) = calls
    assert program == sys.executable and arguments == [sys.executable, "-m", "gpt2jax", "finetune"]
    assert environment["GLIBC_TUNABLES"] == "glibc.other=1:glibc.malloc.hugetlb=1"
    monkeypatch.setenv("GLIBC_TUNABLES", environment["GLIBC_TUNABLES"])
    _launcher.restart_in_huge_pages()
    assert len(calls) == 1


VARIABLES = ("DIR", "MAX_SIZE")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The user's cache folder; what the tests set is forgotten."""
    for name in (
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
        *(f"JAX_COMPILATION_CACHE_{x}" for x in VARIABLES),
    ):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("GPT2JAX_CACHE", str(tmp_path))
    return tmp_path


def test_keep_compiled_programs_names_a_bounded_folder(cache):
    _launcher.keep_compiled_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"].startswith(str(cache / "programs"))
    assert 0 < int(os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"]) <= 2**30


def test_keep_compiled_programs_leaves_the_folder_that_a_user_named(cache, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "mine")
    _launcher.keep_compiled_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "mine"
    assert "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ
