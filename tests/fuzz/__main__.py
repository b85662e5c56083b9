"""Damages files and reads them: python -m tests.fuzz --minutes 20 [--only READER ...].

Each file must be read, or refused with an error that a user can cause and that names the file, in bounded time and
memory. Every kind of failure is printed once, with the folder that reproduces it.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

from tests.fuzz.mutations import mutate
from tests.fuzz.worker import Worker


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="for all readers together")
    parser.add_argument(
        "--files", type=int, help="the number of files of each reader, instead of the minutes"
    )
    parser.add_argument("--only", nargs="*", default=(), help="readers whose names hold one of these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for the files that fail; default: a temporary one")
    parser.add_argument(
        "--read", nargs=2, metavar=("READER", "FOLDER"), help="read the files of a failure again"
    )
    options = parser.parse_args()
    if options.read:
        from tests.fuzz.readers import READERS

        READERS[options.read[0]].read(Path(options.read[1]))
        return 0
    out = options.out or Path(tempfile.mkdtemp(prefix="fuzz-"))
    return _run(options, out)


def _run(options: argparse.Namespace, out: Path) -> int:
    from tests.fuzz.readers import READERS

    names = [name for name in READERS if not options.only or any(part in name for part in options.only)]
    seconds = options.minutes * 60 / max(1, len(names))
    worker, failures, tried = Worker(), Counter[str](), 0
    try:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
            for name in names:
                began, number = time.monotonic(), 0
                valid, case = Path(scratch, f"valid-{name}"), Path(scratch, f"case-{name}")
                valid.mkdir()
                worker.write(name, valid)
                said = worker.read(name, valid)
                assert said is None, f"{name}: a valid file fails: {said}"
                while number < options.files if options.files else time.monotonic() - began < seconds:
                    _damage(valid, case, READERS[name].damaged, Random(f"{options.seed} {name} {number}"))
                    said = worker.read(name, case)
                    number += 1
                    if said is not None:
                        kind = re.sub(r"\d{3,}|0x\w+|'.*|\".*", "…", said.replace(str(case), "…"))[:120]
                        failures[f"{name}: {kind}"] += 1
                        if failures[f"{name}: {kind}"] == 1:
                            place = shutil.copytree(case, out / f"{name}-{len(failures)}", dirs_exist_ok=True)
                            print(
                                f"{name}: {said}\n    python -m tests.fuzz --read {name} {place}", flush=True
                            )
                tried += number
    finally:
        worker.close()
    print(
        f"{tried} files, {len(names)} readers, {len(failures)} kinds of failure, {failures.total()} failures"
    )
    return 1 if failures else 0


def _damage(valid: Path, case: Path, pattern: str, random: Random) -> None:
    """Make a copy of valid files, of which one or two are damaged."""
    shutil.rmtree(case, ignore_errors=True)
    shutil.copytree(valid, case)
    files = sorted(file for file in case.rglob(pattern) if file.is_file())
    for file in random.sample(files, min(len(files), random.choice((1, 1, 1, 2)))):
        file.write_bytes(mutate(file.read_bytes(), random))


if __name__ == "__main__":
    sys.exit(main())
