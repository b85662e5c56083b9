"""Programs in another process, where a CPU passes for several devices."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any


def on_four_devices(program: str, flags: str = "") -> Any:
    """What a Python program prints, read as JSON; it sees four devices, and the modules of this folder."""
    here = str(pathlib.Path(__file__).parent)
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4 {flags}"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\nsys.path.insert(0, {here!r})\n{program}"],
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
