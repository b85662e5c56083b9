"""Memory of long evaluations, and what a kill costs: the same command over 1,000, 10,000 and 100,000 documents.

    python benchmarks/evaluation_memory.py

Writes passages of the documentation inside Python's standard library, each with its own number, into a temporary
file and runs `gpt2jax evaluate --out FOLDER` on the first of them, once for each number. The largest run is done again,
killed with SIGKILL when its state file says that half is done, resumed, and its figures are compared with those of the
undisturbed run, to the last digit. Memory is the largest resident size of the process, as Linux counts it.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from contenders import print_table, resident

WORDS = (8, 48)  # of a document: from, to


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="gpt2-mini")
    parser.add_argument("--documents", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--sequence-length", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--windows", default="truncate", help="truncate, non_overlapping, sliding, rolling")
    options = parser.parse_args()
    largest = max(options.documents)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_documents(folder / "documents.jsonl", largest)
        for count in sorted(options.documents):
            seconds, peak = evaluate(options, folder, f"whole-{count}", count)
            rows.append((f"{count:,} documents", f"{seconds:.0f} s", f"{peak / 2**20:.0f} MiB"))
        whole = folder / f"whole-{largest}"
        half = (whole / "state.npz").stat().st_size / 2
        seconds, peak = evaluate(options, folder, "killed", largest, kill_at=half)
        done = documents_done(folder / "killed")
        rows.append((f"killed after {done:,}", f"{seconds:.0f} s", f"{peak / 2**20:.0f} MiB"))
        seconds, peak = evaluate(options, folder, "killed", largest, "--resume")
        rows.append((f"resumed, {largest - done:,} more", f"{seconds:.0f} s", f"{peak / 2**20:.0f} MiB"))
        same = figures(folder / "killed") == figures(whole)
    title = (
        f"gpt2jax evaluate, {options.model}, {options.windows} windows of {options.sequence_length} tokens"
    )
    print_table(title, ("run", "time", "peak memory"), rows)
    print("the resumed run's figures are", "the same to the last digit" if same else "OTHERS: THIS IS A BUG")
    raise SystemExit(0 if same else 1)


def write_documents(path: Path, count: int) -> None:
    """Passages of 8 to 48 words of real prose, no two alike."""
    from gpt2jax.data.docs_corpus import builtin_texts

    words = re.findall(r"\S+\s*", " ".join(builtin_texts("python-docs")))
    with open(path, "w", encoding="utf-8") as file:
        for index in range(count):
            size = WORDS[0] + index * 7 % (WORDS[1] - WORDS[0] + 1)
            start = index * 101 % (len(words) - size)
            text = "".join(words[start : start + size]) + f"({index})"
            file.write(json.dumps({"text": text}) + "\n")


def evaluate(
    options: argparse.Namespace,
    folder: Path,
    out: str,
    count: int,
    *more: str,
    kill_at: float | None = None,
) -> tuple[float, int]:
    """Seconds and peak bytes of one run; with `kill_at`, one that is killed when its state is as large."""
    command = [
        sys.executable,
        "-c",
        "from gpt2jax.cli import start; start()",
        "evaluate",
        "--eval-split",
        "all",
    ]
    command += ["--model", options.model, "--data", str(folder / "documents.jsonl")]
    command += ["--limit", str(count), *more]
    command += ["--sequence-length", str(options.sequence_length), "--batch-size", str(options.batch_size)]
    command += ["--windows", options.windows, "--out", str(folder / out)]
    state, peak, began = folder / out / "state.npz", 0, time.perf_counter()
    with (
        open(folder / f"{out}.log", "w") as log,
        subprocess.Popen(command, stdout=log, stderr=log) as process,
    ):
        while process.poll() is None:
            peak = max(peak, resident("VmHWM", process.pid))
            if kill_at is not None and state.exists() and state.stat().st_size >= kill_at:
                process.send_signal(signal.SIGKILL)
                process.wait()
            time.sleep(0.05)
    if process.returncode != (0 if kill_at is None else -signal.SIGKILL):
        raise SystemExit(
            f"{' '.join(command)}: ended with {process.returncode}\n{Path(log.name).read_text()}"
        )
    return time.perf_counter() - began, peak


def documents_done(folder: Path) -> int:
    """Documents in the state that a run left."""
    import numpy as np

    with np.load(folder / "state.npz") as state:
        return len(state["per_document.tokens"])


def figures(folder: Path) -> dict[str, Any]:
    """What was found, without the time and the command."""
    found = json.loads((folder / "evaluation.json").read_text())
    return {name: value for name, value in found.items() if name not in ("seconds", "command")}


if __name__ == "__main__":
    main()
