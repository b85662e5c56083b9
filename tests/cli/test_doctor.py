"""`gpt2jax doctor`: its rows, its exit code, and that its checks tell what is wrong."""

from __future__ import annotations

import importlib.metadata
import logging
import subprocess
import sys

import numpy as np
import pytest
from tiny_models import TINY

from gpt2jax.cli import main
from gpt2jax.doctor import environment, numerics, resume
from gpt2jax.doctor.findings import run_check
from gpt2jax.ops.precision import Precision

SHORT = ["doctor", "--no-numerics", "--no-resume"]


def test_doctor_shows_versions_devices_and_caches(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("GPT2JAX_CACHE", str(tmp_path))
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "a.tokens").write_bytes(bytes(1_200_000))
    main(SHORT)
    shown = capsys.readouterr().out
    assert "jaxlib 0." in shown and "device 0" in shown and "cache of hub" in shown
    assert "blockwise because the scores of a block fit the CPU's caches" in shown
    assert "1.2 MB in 1 files" in shown
    assert shown.endswith("all is well\n") and "failed" not in shown


def test_doctor_exits_with_1_if_a_check_failed(capsys, monkeypatch):
    def broken():
        raise RuntimeError("no [red]cache[/red]\x1b[31m")

    monkeypatch.setattr(environment, "check_caches", broken)
    with pytest.raises(SystemExit) as end:
        main(SHORT)
    shown = capsys.readouterr().out
    assert end.value.code == 1 and "no [red]cache[/red]\\x1b[31m" in shown and "1 of " in shown


@pytest.mark.parametrize(
    ("versions", "statuses"),
    [
        ({"jax": "0.12.0", "flax": "0.12.10"}, ["failed"]),
        ({"jax": "0.11.0", "flax": "0.12.10"}, []),
        ({"jax": "0.12.0", "flax": "0.12.12"}, []),
        ({"jax": "0.10.2", "orbax-checkpoint": "0.11.16"}, ["failed"]),
        ({"jaxlib": "0.10.2"}, ["note"]),
        ({"jaxlib": "0.11.2"}, ["note"]),
        ({}, []),
    ],
)
def test_find_known_problems_names_versions(versions, statuses):
    assert [finding.status for finding in environment.find_known_problems(versions)] == statuses


def test_check_versions_fails_for_what_is_not_installed_as_declared(monkeypatch):
    declared = ["tyro>=0.9.1", "rich>=13.7", "numpy>=2.0", 'none-such>=1; extra == "peers"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: declared)
    installed = environment._version
    versions = {"tyro": "0.9.0", "rich": None}
    monkeypatch.setattr(environment, "_version", lambda name: versions.get(name, installed(name)))
    texts = {f.subject: f.text for f in environment.check_versions() if f.status == "failed"}
    assert texts.keys() == {"tyro", "rich"}
    assert "got 0.9.0" in texts["tyro"] and "got none" in texts["rich"]


def test_check_versions_of_a_folder_on_the_path(monkeypatch):
    def requires(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    (note,) = [finding for finding in environment.check_versions() if finding.subject == "gpt2jax"]
    assert note.status == "note" and "is not installed" in note.text


def test_commands_show_the_error_of_a_plugin_in_one_line(capsys):
    logger = logging.getLogger("jax._src.xla_bridge")
    main(SHORT)
    handler = logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)
    try:
        raise RuntimeError("cuInit failed\n  Unknown error")
    except RuntimeError:
        logger.exception("Exception when calling %s", "initialize()")
    finally:
        logger.removeHandler(handler)
    assert "Exception when calling initialize(): cuInit failed Unknown error\n" in capsys.readouterr().err


@pytest.mark.slow
def test_check_numerics_tells_programs_that_are_less_exact(monkeypatch):
    cases = {"tiny": (TINY, 2, 16)}
    assert [finding.status for finding in numerics.check_numerics(cases)] == ["ok"] * 3
    choose = Precision.for_device
    monkeypatch.setattr(Precision, "for_device", lambda dtype: choose("bfloat16"))
    found = [finding.status for finding in numerics.check_numerics(cases)]
    assert found == ["ok", "failed", "ok"]


@pytest.mark.parametrize("wrong", [2e-5, np.nan, np.inf])
def test_check_numerics_names_the_worst(wrong):
    finding = numerics._judge("gradients", "float32", {"a": 1e-6, "b": wrong, "c": 0.0})
    assert finding.status == "failed" and "(b)" in finding.text
    assert numerics._judge("gradients", "float32", {"a": 1e-6, "b": 1e-5}).status == "ok"


@pytest.mark.slow
@pytest.mark.thorough
def test_check_resume_kills_and_resumes_a_run(tmp_path):
    (finding,) = resume.check_resume(tmp_path)
    assert finding.status == "ok" and "bit for bit" in finding.text
    assert list(tmp_path.iterdir()) == []


def test_check_resume_tells_a_run_that_wrote_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    (finding,) = run_check("resume", lambda: resume.check_resume(tmp_path))
    assert finding.status == "failed" and "the run wrote no checkpoint: no answer" in finding.text


@pytest.mark.slow
def test_commands_tell_a_device_that_is_not_here_in_one_line(tmp_path):
    """All in one process, whose jax has no device."""
    (tmp_path / "texts.txt").write_text("a text\n" * 20)
    script = """
import os, sys
from gpt2jax.cli import main
data, out = sys.argv[1], sys.argv[2]
commands = [
    ["doctor"],
    ["evaluate", "--data", data],
    ["generate", "a"],
    ["finetune", "--data", data, "--out", out + "/run"],
    ["compare", "gpt2-mini", "gpt2", "--data", data, "--out", out + "/report"],
]
for command in commands:
    try:
        main(command)
    except SystemExit as end:
        print(command[0], end.code, flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "texts.txt"), str(tmp_path)],
        env={
            "JAX_PLATFORMS": "cuda",
            "COLUMNS": "200",
            "HF_HUB_OFFLINE": "1",
            "GPT2JAX_CACHE": str(tmp_path),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr
    codes = [line for line in done.stdout.splitlines() if line.endswith((" 1", " 2"))]
    assert codes == ["doctor 1", "evaluate 2", "generate 2", "finetune 2", "compare 2"], done.stderr
    wanted = "JAX_PLATFORMS must be empty, or name devices that jax finds here, got 'cuda'"
    assert done.stdout.count(wanted) == 1 and done.stderr.count(wanted) == 4
