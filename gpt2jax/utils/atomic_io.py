"""Write files and folders whole or not at all: beside their place, flushed to the disk, then renamed.

What is being written is named .NAME.gpt2jax-XXXXXXXX.part and locked by its process. If a process is killed, the next
one that writes into the same folder finds it unlocked and deletes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from gpt2jax.utils.notices import notice
from gpt2jax.utils.validation import check, one_of

try:
    import fcntl
except ModuleNotFoundError:  # Windows has no such locks, and leaves what a killed process was writing
    fcntl = None

_LEFTOVER = re.compile(r"\..*\.gpt2jax-[a-z0-9_]{8}\.(part|old)", re.DOTALL)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
# the number of an operating system's error in the messages of TensorStore, safetensors and HDF5
_ERROR_NUMBER = re.compile(r"(?:os.error(?:.code)?|errno)\W{1,4}(\d+)", re.IGNORECASE)


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
        OSError: the file can't be written; the message names it.
    """
    check("mode", mode, one_of(("w", "wb")))
    target = follow_links(path)
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file")
    if target.exists() and not target.is_file():  # a device or a pipe, which must not be replaced by a file
        with naming_file(path), open(path, mode, **_as_text(mode)) as stream:
            yield stream
        return
    make_folder(target.parent)
    with naming_file(path), contextlib.ExitStack() as stack:
        permissions = target.stat().st_mode & 0o7777 if target.exists() else 0o666 & ~_umask()
        aside = stack.enter_context(_place_beside(target, ".part", _make_file))
        with open(aside, mode, **_as_text(mode)) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(aside, permissions)
        os.replace(aside, target)
        sync_folder(target.parent)


@contextmanager
def atomic_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Give an empty folder beside `path` to fill, and rename it to `path` when the block ends well.

    When the block raises, nothing is left and an existing folder stays as it was. Wherever the process is killed,
    `path` is the old folder or the new one, if the system can exchange two names at once. Otherwise both may have other
    names for a moment, and `recover_folder` gives the old one its name again.

    Args:
        path: the folder to make. An empty folder of that name counts as absent.
        overwrite: replace an existing folder with content.

    Raises:
        FileExistsError: `path` is a file, or a folder with content and `overwrite` is False, or holds the folder that
            the process works in, which must not disappear under it.
        OSError: the folder can't be written; the message names it.
    """
    target = follow_links(path)
    recover_folder(target)
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{path} is a file; give the name of a folder")
    if not overwrite and target.is_dir() and any(target.iterdir()):
        raise FileExistsError(f"{path} exists and is not empty; give another name or allow overwriting")
    if target in _working_folders():
        raise FileExistsError(f"{path} is the working folder, or holds it; give the name of a folder in it")
    make_folder(target.parent)
    with naming_file(path), _place_beside(target, ".part", tempfile.mkdtemp) as aside:
        os.chmod(aside, 0o777 & ~_umask())  # mkdtemp makes it private
        yield aside
        for folder, _, names in os.walk(aside):
            for name in names:
                _sync_file(os.path.join(folder, name))
            sync_folder(folder)
        _take_name(aside, target)
        sync_folder(target.parent)


def recover_folder(path: str | os.PathLike[str]) -> None:
    """Give a folder its name back if a process was killed while it replaced the folder; else do nothing."""
    target = Path(os.path.realpath(path))
    if os.path.lexists(target) or not target.parent.is_dir():
        return
    for old in sorted(target.parent.glob("*.old"), key=lambda entry: entry.lstat().st_mtime, reverse=True):
        if old.name.startswith(_prefix(target)) and any(old.iterdir()):
            with contextlib.suppress(OSError), _lock(old):  # or a living process is replacing it
                os.rename(old, target)
                notice(f"{target} has its name again: a program was killed while it replaced the folder")
                return


def make_folder(path: str | os.PathLike[str]) -> None:
    """Make a folder and the folders that hold it, where they do not exist.

    Raises:
        NotADirectoryError: one of them is a file, or a link to what does not exist; the message names it.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        for place in (path, *path.parents):
            if os.path.lexists(place) and not place.is_dir():
                raise NotADirectoryError(f"{describe_place(place)}; expected a folder") from None
        raise


def follow_links(path: str | os.PathLike[str]) -> Path:
    """Return where a path leads: a link keeps pointing to its file.

    Raises:
        FileNotFoundError: a link leads to no place; the message names it.
    """
    path, target = Path(path), Path(os.path.realpath(path))
    can_be_made = target.parent.is_dir() and not target.is_symlink()  # it is one if links lead in a circle
    for place in (path, *path.parents):
        if place.is_symlink() and not place.exists() and not (place == path and can_be_made):
            raise FileNotFoundError(f"{describe_place(place)}; choose another place")
    return target


def describe_place(place: Path) -> str:
    """Say what stands where something else is expected."""
    if place.is_symlink() and not place.exists():
        return f"{place} is a link to {os.readlink(place)}, which does not exist"
    return f"{place} is a file"


@contextmanager
def naming_file(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an error of the block that means a full or read-only disk into an OSError that names a file."""
    try:
        yield
    except Exception as error:
        found = _ERROR_NUMBER.search(str(error))
        number = (isinstance(error, OSError) and error.errno) or (found and int(found[1]))
        if number not in _NO_ROOM:
            raise
        hint = (
            "choose another folder" if number == errno.EROFS else "make room there, or choose another folder"
        )
        reason = f"{os.strerror(number)}; {hint}"
        if not isinstance(error, OSError):
            raise OSError(number, reason, os.fspath(path)) from None
        # the same error, by which a caller may know that it was its own
        error.errno, error.strerror, error.filename = number, reason, os.fspath(path)
        raise


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Make a rename survive a crash, on systems that let a folder be opened."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# ---- what is being written: a file or folder beside its place ----


@contextmanager
def _place_beside(target: Path, suffix: str, make: Callable[..., str]) -> Iterator[Path]:
    """Make a file or folder beside `target` and lock it; what has its name when the block ends is deleted."""
    _remove_leftovers(target)
    with contextlib.ExitStack() as stack:
        while True:
            aside = Path(make(dir=target.parent, prefix=_prefix(target), suffix=suffix))
            try:
                stack.enter_context(_lock(aside))
            except (BlockingIOError, FileNotFoundError):  # another process took it for a leftover
                continue
            except OSError:  # a file system without locks
                pass
            break
        stack.callback(_remove, aside)
        yield aside


def _make_file(**names: Any) -> str:
    handle, path = tempfile.mkstemp(**names)
    os.close(handle)
    return path


def _prefix(target: Path) -> str:
    """Return what the names of everything that is written beside `target` begin with; a name has at most 255 bytes."""
    return f".{os.fsdecode(os.fsencode(target.name)[:200])}.gpt2jax-"


def _remove_leftovers(target: Path) -> None:
    """Delete what dead processes were writing into the folder of `target`, and what they had replaced by it."""
    for entry in target.parent.iterdir():
        is_replaced = entry.suffix == ".old" and entry.name.startswith(_prefix(target)) and target.exists()
        if _LEFTOVER.fullmatch(entry.name) and (entry.suffix == ".part" or is_replaced):
            with contextlib.suppress(OSError), _lock(entry):
                _remove(entry)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Lock a file or folder during the block.

    Raises:
        BlockingIOError: a process has it.
        FileNotFoundError: it is not there, or no more.
        OSError: there are no locks.
    """
    if fcntl is None:
        raise OSError(errno.ENOTSUP, "no locks")
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(handle), os.lstat(path)):
            raise FileNotFoundError(errno.ENOENT, "replaced", os.fspath(path))
        yield
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    """Delete a file or folder as far as that is possible."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


# ---- the new one takes the name of the old one ----


def _take_name(aside: Path, target: Path) -> None:
    """Rename a folder over another one, which `os.replace` does only for empty ones."""
    if not target.exists():
        os.rename(aside, target)
    elif not _exchange(aside, target):
        with _place_beside(target, ".old", tempfile.mkdtemp) as old, contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # other processes must not take it for a leftover
                stack.enter_context(_lock(target))
            os.rename(target, old)
            try:
                os.rename(aside, target)
            except BaseException:
                os.rename(old, target)
                raise


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders at once; return False if the system cannot."""
    rename = _renameat2()
    here, both = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of linux/fcntl.h and linux/fs.h
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), both) == 0


@functools.cache
def _renameat2() -> Any:
    """Return the C library's function, which Linux has."""
    try:
        return ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):  # another system
        return None


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
