"""Exactness and speed of gpt2jax on a GPU, beside torch and plain JAX, in one command of at most 8 minutes.

    python benchmarks/gpu.py                   all of it; writes benchmarks/results/NAME-OF-THE-CARD.json
    python benchmarks/gpu.py --only decode     only the cases whose name holds that, without the checks
    python benchmarks/gpu.py --smoke           tiny cases in a minute, on a CPU too

First come the checks of gpu_exactness.py, then the cases of gpu_contenders.py. Each library runs a case in a process of
its own, which stays idle while the others take their turn; the times are medians over rounds. What is not installed is
named and left out. A part that fails or takes too long is named too, and the rest goes on; the exit code is then 1.
Parts for which no time was left are named, and do not count as failed. Nothing is read from a network.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if importlib.util.find_spec("gpt2jax") is None:  # a checkout that is not installed
    sys.path.append(str(HERE.parent))

from contenders import Answer, Contender, median, print_table, serve, take_turns  # noqa: E402
from gpu_contenders import CASES, MAKERS, SMOKE, Case, peak_bytes  # noqa: E402

from gpt2jax.cli._launcher import set_compiler_parts  # noqa: E402

set_compiler_parts()

SECONDS = 465  # of everything; the 8 minutes of a lent machine hold its start too
EXACTNESS_SECONDS, CASE_SECONDS = 150, 75
ROUNDS = 5
TURN_SECONDS = 0.5  # long enough that the wait at its end does not count
ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # the processes share the device
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "optax", "numpy", "torch")
PACKAGES += ("transformers", "peft", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")


def main(argv: list[str] | None = None) -> int:
    """Run the checks and the cases, print tables, write the results; with --worker it is a library's process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="tiny cases, which prove that all of it runs")
    parser.add_argument("--only", help="the cases whose name holds this, without the checks")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="begin nothing after so long")
    parser.add_argument("--out", type=Path, help="file for the results; --smoke writes none without it")
    parser.add_argument("--worker", nargs=2, metavar=("NAME", "CASE"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    cases = SMOKE if options.smoke else CASES
    if options.worker:
        name, number = options.worker
        serve(lambda: check_worker() if name == "checks" else speed_worker(name, cases[int(number)]))
        return 0
    results: dict[str, Any] = {"versions": versions(), "card": card(), "failed": [], "left out": []}
    ends = time.monotonic() + options.seconds
    results["exactness"] = [] if options.only else run_checks(options, results, ends)
    results["speed"] = list(run_cases(options, cases, results, ends))
    show(results)
    save(options, results)
    return 1 if results["failed"] else 0


# ---- exactness ----


def check_worker() -> tuple[Answer, Callable[[str], Answer]]:
    """Answers one check after the other; {"done": True} after the last."""
    from gpu_exactness import check_all, smoke_checks

    checks = smoke_checks() if "--smoke" in sys.argv else check_all()
    return describe(), lambda line: next(checks, {"done": True})


def describe() -> Answer:
    """What gpt2jax runs on, and what it has chosen for that."""
    import jax
    from gpu_contenders import precision

    device = jax.local_devices()[0]
    chosen = {dtype: precision(dtype).execution.describe() for dtype in ("float32", "bfloat16", "float16")}
    return {"platform": device.platform, "kind": device.device_kind, "chosen": chosen}


def run_checks(options: argparse.Namespace, results: dict[str, Any], ends: float) -> list[Answer]:
    """Return the figures of all checks, and note what failed."""
    found: list[Answer] = []
    child = Contender(*sys.argv[1:], "--worker", "checks", "0", environment=ENVIRONMENT)
    with limit([child], ends - time.monotonic() if options.smoke else EXACTNESS_SECONDS):
        results["device"] = answer = child.ask()
        while "done" not in answer and "missing" not in answer:
            answer = child.ask("next")
            if "name" in answer:
                found.append(answer)
                print(check_line(answer), flush=True)
    if "missing" in answer:
        note(results, "failed", "exactness", answer["missing"])
    results["failed"] += [one["name"] for one in found if not one.get("passed", True)]
    child.close()
    return found


def check_line(answer: Answer) -> str:
    """One line about a check."""
    if "value" not in answer:
        return f"{answer['name']}: {answer.get('error') or 'left out: ' + answer['left out']}"
    outcome = "right" if answer["passed"] else "WRONG"
    return f"{answer['name']}: {answer['value']:.2g}, at most {answer['limit']:g}: {outcome}"


# ---- speed ----


def speed_worker(name: str, case: Case) -> tuple[Answer, Callable[[str], Answer]]:
    """Makes a library's case and runs it once; then runs it as often as each line says."""
    began = time.perf_counter()
    run = MAKERS[name](case)
    run(1)
    first = time.perf_counter() - began
    began = time.perf_counter()
    run(2)
    estimate = (time.perf_counter() - began) / 2

    def turn(line: str) -> Answer:
        began = time.perf_counter()
        run(int(line))
        return {"seconds": (time.perf_counter() - began) / int(line), "peak": peak_bytes(name)}

    return {"first": first, "estimate": estimate}, turn


def run_cases(
    options: argparse.Namespace, cases: tuple[Case, ...], results: dict[str, Any], ends: float
) -> Iterator[dict[str, Any]]:
    """Yield the figures of each case that there is time for, and note what failed."""
    for number, case in enumerate(cases):
        if options.only and options.only not in case.name:
            continue
        left = ends - time.monotonic()
        if left < 15:
            note(results, "left out", case.name, "no time left")
            continue
        began = time.monotonic()
        answers = run_case(options, number, case, results, left if options.smoke else min(CASE_SECONDS, left))
        seconds = time.monotonic() - began
        print(f"{case.name}: {', '.join(answers) or 'nothing'} in {seconds:.0f} s", flush=True)
        yield {"case": case.name, "tokens": case.tokens, "contenders": answers}


def run_case(
    options: argparse.Namespace, number: int, case: Case, results: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """Return the figures of each library that ran the case."""
    running = {  # all start at once: on many cores they compile beside each other
        name: Contender(*sys.argv[1:], "--worker", name, str(number), environment=ENVIRONMENT)
        for name in case.contenders
    }
    on_missing = functools.partial(note_missing, results, case)
    first: dict[str, Answer] = {}
    with limit(running.values(), seconds):
        for name, child in running.items():
            answer = child.ask()
            if "missing" in answer:
                on_missing(name, answer["missing"])
            else:
                first[name] = answer
        times = {name: max(1, min(200, round(TURN_SECONDS / one["estimate"]))) for name, one in first.items()}
        lines = {name: str(1 if options.smoke else count) for name, count in times.items()}
        rounds = 2 if options.smoke else ROUNDS
        answers = take_turns({name: running[name] for name in first}, rounds, lines, on_missing)
    for child in running.values():
        child.close()
    return {
        name: {
            **first[name],
            "seconds": [row["seconds"] for row in rows],
            "peak": rows[-1]["peak"],
            "median": median(rows, "seconds"),
        }
        for name, rows in answers.items()
    }


def note_missing(results: dict[str, Any], case: Case, name: str, why: str) -> None:
    """Note a library that did not run a case: one that is not installed has not failed."""
    kind = "left out" if why.startswith("No module named") else "failed"
    note(results, kind, f"{name}: {case.name}", why)


def note(results: dict[str, Any], kind: str, what: str, why: str) -> None:
    """Note and print what "failed" or was "left out"."""
    results[kind].append(f"{what}: {why}")
    print(f"{kind}: {what}: {why}", flush=True)


class limit:
    """Within it, the processes are killed once the time is over; what they are asked is then answered as missing."""

    def __init__(self, children: Any, seconds: float):
        self._timer = threading.Timer(max(1.0, seconds), lambda: [child.kill() for child in children])

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *error: object) -> None:
        self._timer.cancel()


# ---- results ----


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def card() -> dict[str, str]:
    """Return name, driver and memory of the first GPU as NVIDIA's tool says; empty without that tool."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    first = said.strip().splitlines()[0].split(", ")
    return dict(zip(("name", "driver", "memory"), first, strict=False))


def show(results: dict[str, Any]) -> None:
    """Print a table of the speeds, and what failed or was left out."""
    rows = []
    for case in results["speed"]:
        own = case["contenders"].get("gpt2jax")
        for name, one in case["contenders"].items():
            speeds = [case["tokens"] / seconds for seconds in one["seconds"]]
            ratio = f"{one['median'] / own['median']:.2f} x" if own else ""
            rows.append(
                (
                    case["case"],
                    name,
                    f"{case['tokens'] / one['median']:,.0f}",
                    f"{min(speeds):,.0f} to {max(speeds):,.0f}",
                    f"{one['median'] * 1e3:,.2f}",
                    ratio,
                    f"{one['peak'] / 1e9:.2f}",
                    f"{one['first']:.0f}",
                )
            )
    where = results["card"].get("name") or platform.processor() or platform.machine()
    packages = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    columns = ("case", "library", "tokens/s", "spread", "ms", "gpt2jax is", "peak GB", "first run, s")
    print_table(f"{where}; {packages}", columns, rows)
    for dtype, chosen in results.get("device", {}).get("chosen", {}).items():
        print(f"{dtype}: {chosen}")
    for kind in ("left out", "failed"):
        for line in results[kind]:
            print(f"{kind}: {line}")


def save(options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Write the results as JSON."""
    if options.out is None and (options.smoke or not results["card"]):
        return
    name = re.sub(r"[^a-z0-9]+", "-", results["card"].get("name", "cpu").lower())
    path = options.out or HERE / "results" / f"gpu-{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {os.path.relpath(path)}")


if __name__ == "__main__":
    raise SystemExit(main())
