"""The loop over damaged files, short and with a fixed seed; `python -m tests.fuzz --minutes 20` is the long one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="measures memory through /proc")
def test_readers_refuse_damaged_files_by_name_in_bounds(tmp_path):
    command = [sys.executable, "-m", "tests.fuzz", "--files", "20", "--out", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 failures" in result.stdout and int(result.stdout.split(" files")[0]) >= 700


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, "None"),
        (ValueError("FOLDER/a.json is damaged"), "None"),
        (ValueError("it is damaged"), "unnamed"),
        (KeyError("FOLDER"), "KeyError"),
        (MemoryError("FOLDER"), "MemoryError"),
    ],
)
def test_worker_tells_legal_errors_from_others(error, outcome):
    pytest.importorskip("resource")
    from tests.fuzz.readers import Reader
    from tests.fuzz.worker import _read

    def read(folder: Path) -> None:
        if error is not None:
            raise error

    assert str(_read(Reader(print, read), Path("FOLDER"))).startswith(outcome)
