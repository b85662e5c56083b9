"""Kills a process at each of its system calls in turn: what it was replacing must be the old or the new one."""

from __future__ import annotations

import pathlib
import subprocess
import sys

# The process forks for each kill. Python reports a child's system calls before they are made (`sys.addaudithook`); the
# child ends itself, as kill -9 would, before its k-th call that concerns the folder.
_SCRIPT = """
import os, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
tmp = Path(sys.argv[1])
target = tmp / "target"
{program}

def concerns_folder(event, arguments):
    return event.startswith(("fcntl.", "ctypes.call")) or any(
        isinstance(argument, (str, bytes, os.PathLike)) and str(tmp) in os.fsdecode(argument)
        for argument in arguments
    )

def run_child(last):
    calls = 0

    def count(event, arguments):
        nonlocal calls
        if concerns_folder(event, arguments):
            calls += 1
            if calls > last:
                os._exit(9)

    sys.addaudithook(count)
    write("new")
    os._exit(0)

write("old")
kills, recovered, seen = 0, 0, set()
while True:
    child = os.fork()
    if child == 0:
        run_child(kills)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    if not target.exists():
        recovered += 1
        recover()
    seen.add(read())
    if code == 0:
        break
    kills += 1
    write("old")
    assert os.listdir(tmp) == ["target"], os.listdir(tmp)
assert read() == "new"
print(kills, recovered, *sorted(seen))
"""


def kill_at_each_call(program: str, folder: pathlib.Path) -> tuple[int, int]:
    """Kill `write("new")` at each system call, check what `read()` returns, and that the next `write` cleans up.

    Args:
        program: defines `write(text)`, which replaces `target`, `read()`, which returns the text, and `recover()`,
            which is called if there is no `target` after a kill. It must not compute with jax: it forks.
        folder: an empty folder.

    Returns:
        (number of kills, number of kills after which there was no `target`).
    """
    script = _SCRIPT.format(program=program)
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    kills, recovered, *seen = done.stdout.split()
    assert seen == ["new", "old"]
    return int(kills), int(recovered)
