"""What the benchmarks share: contenders in separate processes that take turns, and their figures side by side.

A benchmark starts itself once for each contender (`start`), which makes its model, answers once, and then answers one
JSON line for each line that it is sent (`serve`). What a contender's libraries print is kept apart from its answers.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Answer = dict[str, Any]

# all contenders alike have what gpt2jax's commands give themselves
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


# ---- the benchmark's side ----


class Contender:
    """A process of the running script with its own arguments."""

    def __init__(self, *arguments: str, environment: Mapping[str, str] | None = None):
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115, closed with the process
        self._process = subprocess.Popen(
            [sys.executable, sys.argv[0], *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, **HUGE_PAGES, "TF_CPP_MIN_LOG_LEVEL": "3", **(environment or {})},
        )

    def ask(self, line: str | None = None) -> Answer:
        """Its next answer, to a line if one is given; {"missing": why} if it has ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        if line is not None:
            with contextlib.suppress(BrokenPipeError):
                print(line, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        return json.loads(answer) if answer else {"missing": self.close()}

    def kill(self) -> None:
        """Ends it at once; what it is asked is then answered as missing."""
        self._process.kill()

    def close(self) -> str:
        """Ends it; the last line it complained with."""
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"ended with code {self._process.returncode}"


def start(
    contenders: Mapping[str, Sequence[str]], environment: Mapping[str, str] | None = None
) -> tuple[dict[str, Contender], dict[str, Answer]]:
    """Starts them one after another, each with its arguments; the processes, and their first answers.

    A contender that has nothing but {"missing": why} to say is named and left out.
    """
    running: dict[str, Contender] = {}
    first: dict[str, Answer] = {}
    for name, arguments in contenders.items():
        contender = Contender(*arguments, environment=environment)
        answer = contender.ask()
        if "missing" in answer:
            contender.close()
            print(f"{name} is left out: {answer['missing']}", flush=True)
        else:
            running[name], first[name] = contender, answer
    return running, first


def take_turns(
    running: Mapping[str, Contender],
    rounds: int,
    lines: str | Mapping[str, str],
    on_missing: Callable[[str, str], None] | None = None,
) -> dict[str, list[Answer]]:
    """Sends each the line, or its own of several, once a round; the answers of each.

    How long each took is shown on the way. A contender that answers {"missing": why} (it has not this size, or has
    died) is named, by `on_missing(name, why)` if that is given, and has no answers.
    """
    answers: dict[str, list[Answer]] = {name: [] for name in running}
    for round_ in range(rounds):
        # every other round backwards, so that none always follows the same one
        for name in list(answers)[:: 1 if round_ % 2 == 0 else -1]:
            line = lines if isinstance(lines, str) else lines[name]
            answer = running[name].ask(line)
            if "missing" in answer:
                if on_missing is None:
                    print(f"{name} is left out of {line!r}: {answer['missing']}", flush=True)
                else:
                    on_missing(name, answer["missing"])
                del answers[name]
            else:
                answers[name].append(answer)
                seconds = f"{answer['seconds']:8.2f} s"
                print(
                    f"{line!r}, round {round_ + 1} of {rounds}: {seconds}  {name}",
                    file=sys.stderr,
                    flush=True,
                )
    return answers


def start_and_take_turns(
    contenders: Mapping[str, Sequence[str]], rounds: int, line: str
) -> tuple[dict[str, Answer], dict[str, list[Answer]]]:
    """Starts contenders, lets them take turns and ends them; the first answers, and those to the line."""
    running, first = start(contenders)
    answers = take_turns(running, rounds, line)
    for contender in running.values():
        contender.close()
    return first, answers


def median(answers: Sequence[Answer], field: str) -> float:
    """Of a field."""
    return statistics.median(answer[field] for answer in answers)


def ratio(answers: Sequence[Answer], peer: Sequence[Answer], field: str = "seconds") -> float:
    """How many times as fast as the peer: median over rounds, since the machine's speed changes between them."""
    return statistics.median(b[field] / a[field] for a, b in zip(answers, peer, strict=True))


def fastest(answers: Mapping[str, Sequence[Answer]], field: str = "seconds") -> str | None:
    """Name of the fastest contender that is not gpt2jax; None if there is none."""
    peers = {name: median(rows, field) for name, rows in answers.items() if not name.startswith("gpt2jax")}
    return min(peers, key=lambda name: peers[name]) if peers else None


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table whose first column is text and whose others are figures."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=130).print(table)


# ---- a contender's side ----


def serve(make: Callable[[], tuple[Answer, Callable[[str], Answer]]]) -> None:
    """Answers what `make` says first, then each line with what the function that it made says of it.

    What fails is answered as {"missing": why}.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print, compiled ones too, goes elsewhere

    def say(answer: Answer) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    try:
        first, turn = make()
    except Exception as error:
        say({"missing": _in_one_line(error)})
        return
    say(first)
    for line in sys.stdin:
        try:
            say(turn(line.strip()))
        except Exception as error:
            say({"missing": _in_one_line(error)})


def _in_one_line(error: Exception) -> str:
    first = (str(error).strip() or repr(error)).splitlines()[0]
    return first if isinstance(error, ImportError) else f"{type(error).__name__}: {first}"


def use_cores(count: int) -> None:
    """Keeps this process to so many cores, and the libraries that it will import to as many threads."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
    os.environ["OMP_NUM_THREADS"] = str(count)


def resident(field: str = "VmHWM", process: int | str = "self") -> int:
    """Bytes of a process in memory, as Linux counts them: "VmRSS" now, "VmHWM" at most; 0 if it has just ended."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return 1024 * next((int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), 0)


def forget_peak() -> None:
    """Lets Linux count this process's "VmHWM" anew, from what it holds now."""
    Path("/proc/self/clear_refs").write_text("5")


# ---- models ----


def backbone(config: Any, dtype: str, **settings: Any) -> Any:
    """keras-hub's GPT-2 of a configuration, with random weights; KERAS_BACKEND says on what."""
    import keras_hub

    return keras_hub.models.GPT2Backbone(
        vocabulary_size=config.vocab_size,
        num_layers=config.n_layer,
        num_heads=config.n_head,
        hidden_dim=config.n_embd,
        intermediate_dim=config.mlp_dim,
        dtype=dtype,
        **{"max_sequence_length": config.n_positions} | settings,
    )
