"""The benchmark of a GPU, which must run without one too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "gpu.py"

# as on a machine that has only what training and generation need
NOT_INSTALLED = ("datasets", "tyro", "google_crc32c", "torch")


@pytest.mark.slow
@pytest.mark.thorough
def test_gpu_benchmark_smoke_runs_on_a_cpu(tmp_path):
    for name in NOT_INSTALLED:
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError({f'No module named {name!r}'!r})")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--smoke", "--out", str(tmp_path / "results.json")],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["failed"] == []
    assert all(check["passed"] for check in results["exactness"])
    for case in results["speed"]:
        assert {"gpt2jax", "plain JAX"} <= set(case["contenders"]), case["case"]
