"""Train in a process that is killed, resume, and compare with a run that was never stopped.

python -m gpt2jax.doctor.resume FOLDER train
python -m gpt2jax.doctor.resume FOLDER compare
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gpt2jax.doctor.findings import Finding
from gpt2jax.language_model import from_config
from gpt2jax.model.config import GPT2Config
from gpt2jax.train.config import FinetuneConfig
from gpt2jax.train.finetune import finetune
from gpt2jax.train.trainer import Run

# many steps behind the first checkpoint, so that the run is killed before its end
SETTINGS = FinetuneConfig(steps=100, batch_size=2, sequence_length=16, checkpoint_every=20, log_every=50)
_SECONDS = 300  # a child that takes longer hangs


def check_resume(folder: Path | None = None) -> Iterator[Finding]:
    """Yield whether a killed and resumed run ends with the same bits as one that was never stopped.

    Args:
        folder: where to write; None: in the system's folder for temporary files.
    """
    with tempfile.TemporaryDirectory(prefix="gpt2jax-doctor-", dir=folder) as place:
        step = _train_and_kill(Path(place))
        done = _start(place, "compare", stdout=subprocess.PIPE).communicate(timeout=_SECONDS)
        text = f"a run was killed after its checkpoint of step {step} and resumed"
        if done[0].strip() == "same":
            yield Finding("write, kill, resume", "ok", f"{text}: the model is the same, bit for bit")
        else:
            why = (done[1].strip() or done[0].strip() or "no answer").splitlines()[-1]
            yield Finding("write, kill, resume", "failed", f"{text}: {why}")


def _train_and_kill(folder: Path) -> int:
    """Kill a run as soon as it has a checkpoint; return the checkpoint's step."""
    began = time.monotonic()
    with _start(str(folder), "train") as child:
        try:
            while not (steps := _saved_steps(folder)):
                if child.poll() is not None or time.monotonic() - began > _SECONDS:
                    child.kill()
                    lines = child.communicate()[1].strip().splitlines()
                    raise RuntimeError(f"the run wrote no checkpoint: {lines[-1] if lines else 'no answer'}")
                time.sleep(0.01)
        finally:
            child.kill()
    return max(steps)


def _saved_steps(folder: Path) -> list[int]:
    return [int(path.name) for path in folder.glob("run/checkpoints/*") if path.name.isdecimal()]


def _start(folder: str, what: str, **options: Any) -> subprocess.Popen[str]:
    # a GPU may be shared with this process, a TPU may not
    variables = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if jax.default_backend() == "tpu":
        variables["JAX_PLATFORMS"] = "cpu"
    command = [sys.executable, "-W", "ignore", "-m", "gpt2jax.doctor.resume", folder, what]
    return subprocess.Popen(
        command, env=os.environ | variables, stderr=subprocess.PIPE, text=True, errors="replace", **options
    )


def _train(output: Path | None, *, resume: bool = False) -> Run:
    config = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=50, n_positions=16)
    texts = [list(range(start, start + 20)) for start in range(20)]
    return finetune(from_config(config), texts, SETTINGS, output=output, resume=resume, progress=False)


def _main(folder: str, what: str) -> None:
    run = Path(folder) / "run"
    if what == "train":
        _train(run)
        return
    found, right = (jax.tree.leaves(each.model.params) for each in (_train(run, resume=True), _train(None)))
    is_same = all(np.array_equal(a, b) for a, b in zip(found, right, strict=True))
    print("same" if is_same else "the model is not that of a run that was never stopped")


if __name__ == "__main__":
    _main(*sys.argv[1:])
