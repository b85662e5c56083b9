"""Write files and folders whole or not at all: beside their place, flushed to the disk, then renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from gpt2jax.utils.validation import check, one_of


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file beside `path` for writing and rename it to `path` when the block ends well.

    Readers see the old content or the new one, never a part. When the block raises, the old file stays as it
    was and nothing is left beside it. Missing parent folders are made. Text is UTF-8 with "\\n" as written.

    Args:
        path: the file to write; an existing file is replaced and keeps its permissions. A device or a pipe is written
            to directly.
        mode: "w" for text, "wb" for bytes.

    Raises:
        ValueError: another mode.
        IsADirectoryError: `path` is a folder.
    """
    check("mode", mode, one_of(("w", "wb")))
    target = Path(os.path.realpath(path))  # a link keeps pointing to its file
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file")
    if target.exists() and not target.is_file():  # a device or a pipe, which must not be replaced by a file
        with open(path, mode, **_as_text(mode)) as stream:
            yield stream
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    permissions = target.stat().st_mode & 0o7777 if target.exists() else 0o666 & ~_umask()
    handle, aside = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:100]}.", suffix=".part")
    try:
        with open(handle, mode, **_as_text(mode)) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(aside, permissions)
        os.replace(aside, target)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


@contextmanager
def atomic_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Give an empty folder beside `path` to fill, and rename it to `path` when the block ends well.

    When the block raises, nothing is left and an existing folder stays as it was.

    Args:
        path: the folder to make. An empty folder of that name counts as absent.
        overwrite: replace an existing folder with content. It is renamed away just before the new one takes
            its name, put back if that fails, and deleted at the end.

    Raises:
        FileExistsError: `path` is a file, or a folder with content and `overwrite` is False, or holds the folder that
            the process works in, which must not disappear under it.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{path} is a file; give the name of a folder")
    if not overwrite and target.is_dir() and any(target.iterdir()):
        raise FileExistsError(f"{path} exists and is not empty; give another name or allow overwriting")
    if target in _working_folders():
        raise FileExistsError(f"{path} is the working folder, or holds it; give the name of a folder in it")
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name[:100]}.", suffix=".part"))
    try:
        os.chmod(aside, 0o777 & ~_umask())  # mkdtemp makes it private
        yield aside
        for folder, _, names in os.walk(aside):
            for name in names:
                _sync_file(os.path.join(folder, name))
            sync_folder(folder)
        _take_name(aside, target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    sync_folder(target.parent)


def _take_name(aside: Path, target: Path) -> None:
    """Rename a folder over another one, which `os.replace` does only for empty ones."""
    if not target.exists():
        os.rename(aside, target)
        return
    old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name[:100]}.", suffix=".old"))
    os.rename(target, old)
    try:
        os.rename(aside, target)
    except BaseException:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _as_text(mode: str) -> dict[str, Any]:
    return {"encoding": "utf-8", "newline": ""} if mode == "w" else {}


def _working_folders() -> tuple[Path, ...]:
    """Return the folder that the process works in, and those that hold it; nothing if it was deleted."""
    try:
        return (Path.cwd(), *Path.cwd().parents)
    except FileNotFoundError:
        return ()


def _umask() -> int:
    """Return the process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_file(path: str | os.PathLike[str]) -> None:
    if os.path.islink(path):
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Make a rename survive a crash, on systems that let a folder be opened."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
