"""A process that reads damaged files and tells how each ended: a crash or a hang there does not end the loop."""

from __future__ import annotations

import multiprocessing
import resource
import signal
import time
import traceback
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SECONDS, MEGABYTES = (
    10,
    500,
)  # what a small file may take; of a large one per megabyte, and beside 4 times its size
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Worker:
    """Starts the process, and starts it again after a crash or a hang."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._start()

    def _start(self) -> None:
        self._pipe, theirs = self._context.Pipe()
        self._process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        assert self._pipe.poll(120) and self._pipe.recv() == "ready"

    def write(self, reader: str, folder: Path) -> None:
        """Write the valid files of a reader."""
        self._pipe.send(("write", reader, str(folder)))
        answer = self._pipe.recv()
        assert answer is None, answer

    def read(self, reader: str, folder: Path) -> str | None:
        """Return what went wrong when the files were read, beginning with the kind; None for a legal end."""
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        seconds = SECONDS * max(1.0, size / 1e6)
        began = time.monotonic()
        self._pipe.send(("read", reader, str(folder)))
        try:
            # on a busy machine the process may stand still, so that its own clock counts
            if self._pipe.poll(10 * seconds):
                said, used, cpu = self._pipe.recv()
                if said is None and used > 4 * size / 1e6 + MEGABYTES:
                    return f"memory: {used:.0f} MB for {size} bytes"
                return f"time: {cpu:.0f} s for {size} bytes" if said is None and cpu > seconds else said
            said = f"hang: no end after {time.monotonic() - began:.0f} s"
        except EOFError:
            self._process.join()
            said = f"crash: exit code {self._process.exitcode}"
        self.close()
        self._start()
        return said

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()


def _serve(pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import gpt2jax
    from tests.fuzz.readers import GOLDEN, READERS

    gpt2jax.load(GOLDEN / "hf-tied")  # what is imported and started on the first use
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    most = size + 8_000_000_000
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    pipe.send("ready")
    while True:
        what, name, folder = pipe.recv()
        if what == "write":
            try:
                READERS[name].write(Path(folder))
                pipe.send(None)
            except Exception:
                pipe.send(traceback.format_exc())
        else:
            pipe.send(_measure(READERS[name], Path(folder)))


def _measure(reader: Any, folder: Path) -> tuple[str | None, float, float]:
    """Return (what went wrong, megabytes that were taken, seconds of the processor)."""
    _RESET.write_text("5")
    before, began = _kilobytes("VmRSS"), time.process_time()
    said = _read(reader, folder)
    return said, (_kilobytes("VmHWM") - before) / 1e3, time.process_time() - began


def _kilobytes(name: str) -> int:
    return int(_STATUS.read_text().partition(f"{name}:")[2].split()[0])


def _read(reader: Any, folder: Path) -> str | None:
    from gpt2jax.cli.common import USER_ERRORS
    from gpt2jax.utils.notices import Notice

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            reader.read(folder)
        except USER_ERRORS as error:
            if folder.name not in str(error):
                return f"unnamed: the error does not name the file: {_describe(error)}"
            if isinstance(error, AssertionError | NotImplementedError):
                return _describe(error)
        except BaseException as error:
            return _describe(error)
    others = [warning for warning in caught if not issubclass(warning.category, Notice)]
    return f"warning: {others[0].category.__name__} {others[0].message}" if others else None


def _describe(error: BaseException) -> str:
    """Return kind and place of an exception: the last two lines of the package that it came through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/gpt2jax/" in frame.filename]
    places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[-2:]]
    return f"{type(error).__name__} at {' '.join(places)}: {error!s:.300}"
