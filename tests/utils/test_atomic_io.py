from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from killing import kill_at_each_call

import gpt2jax.utils.atomic_io as atomic_io
from gpt2jax.utils.atomic_io import atomic_folder, atomic_write, recover_folder
from gpt2jax.utils.notices import Notice


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_atomic_write_text_and_bytes(tmp_path):
    with atomic_write(tmp_path / "new" / "a.txt") as file:
        file.write("ä\nb\r\n")
    assert (tmp_path / "new" / "a.txt").read_bytes() == "ä\nb\r\n".encode()
    with atomic_write(str(tmp_path / "a.bin"), "wb") as file:
        file.write(b"\x00\xff")
    assert (tmp_path / "a.bin").read_bytes() == b"\x00\xff"
    assert names(tmp_path) == ["a.bin", "new"]


def test_atomic_write_keeps_old_content_until_the_end(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_write(path) as file:
        file.write("new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_atomic_write_leaves_nothing_after_an_error(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), atomic_write(path) as file:
        file.write("half")
        raise error
    assert path.read_text() == "old"
    with pytest.raises(error), atomic_write(tmp_path / "b.txt"):
        raise error
    assert names(tmp_path) == ["a.txt"]


def test_atomic_write_permissions(tmp_path):
    old = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "a.txt"):
            pass
        with atomic_folder(tmp_path / "f"):
            pass
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o750
    (tmp_path / "a.txt").chmod(0o600)
    with atomic_write(tmp_path / "a.txt") as file:
        file.write("x")
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o600


def test_atomic_write_keeps_a_link(tmp_path):
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    with atomic_write(tmp_path / "link.txt") as file:
        file.write("new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"


def test_atomic_write_does_not_replace_a_pipe(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with atomic_write(path) as file:
        file.write("ä\n")
    assert os.read(reader, 100) == "ä\n".encode() and path.is_fifo() and names(tmp_path) == ["pipe"]
    os.close(reader)


def test_atomic_write_refuses_wrong_targets(tmp_path):
    with (
        pytest.raises(ValueError, match="mode must be one of w, wb, got 'a'"),
        atomic_write(tmp_path / "a", "a"),
    ):
        pass
    with pytest.raises(IsADirectoryError, match="is a folder"), atomic_write(tmp_path):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file"), atomic_folder(tmp_path / "file"):
        pass


def test_atomic_folder_appears_whole(tmp_path):
    target = tmp_path / "deep" / "run"
    with atomic_folder(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a.txt").write_text("a")
        (folder / "dangling").symlink_to("nowhere")
        assert not target.exists()
    assert (target / "sub" / "a.txt").read_text() == "a"
    assert names(tmp_path / "deep") == ["run"]


def test_atomic_folder_leaves_nothing_after_an_error(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "run") as folder:
        (folder / "a.txt").write_text("half")
        raise RuntimeError
    assert names(tmp_path) == []


def test_atomic_folder_overwrites_only_if_told(tmp_path):
    target = tmp_path / "run"
    target.mkdir()
    with atomic_folder(target) as folder:  # empty: as good as absent
        (folder / "a").write_text("1")
    with pytest.raises(FileExistsError, match="exists and is not empty"), atomic_folder(target):
        pass
    with pytest.raises(RuntimeError), atomic_folder(target, overwrite=True):
        raise RuntimeError
    assert names(target) == ["a"]
    with atomic_folder(target, overwrite=True) as folder:
        (folder / "b").write_text("2")
    assert names(target) == ["b"]
    assert names(tmp_path) == ["run"]


@pytest.mark.parametrize("path", [".", "..", "../here"])
def test_atomic_folder_does_not_replace_the_working_folder(tmp_path, monkeypatch, path):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(FileExistsError, match="is the working folder"), atomic_folder(path, overwrite=True):
        pass
    assert os.path.samefile(".", tmp_path / "here") and names(tmp_path) == ["here"]


def test_atomic_folder_in_a_deleted_working_folder(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with atomic_folder(tmp_path / "model") as folder:
        (folder / "a").write_text("a")
    assert (tmp_path / "model" / "a").read_text() == "a"
    monkeypatch.chdir(tmp_path)


def test_atomic_folder_restores_the_old_folder(tmp_path, monkeypatch):
    target = tmp_path / "run"
    target.mkdir()
    (target / "a").write_text("old")
    rename = os.rename

    def failing(source, destination):
        if Path(destination) == target and "new" in names(Path(source)):
            raise OSError("no")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", failing)
    monkeypatch.setattr(atomic_io, "_exchange", lambda one, other: False)  # a system that cannot
    with pytest.raises(OSError, match="no"), atomic_folder(target, overwrite=True) as folder:
        (folder / "new").write_text("")
    assert (target / "a").read_text() == "old"
    assert names(tmp_path) == ["run"]


KILLED_FILE = """
from gpt2jax.utils.atomic_io import atomic_write

def write(text):
    with atomic_write(target) as file:
        file.write(text)

read = target.read_text
"""

KILLED_FOLDER = """
import gpt2jax.utils.atomic_io as atomic_io

def write(text):
    with atomic_io.atomic_folder(target, overwrite=True) as folder:
        (folder / "sub").mkdir()
        for name in ("a", "sub/b", text):
            (folder / name).write_text(text)

def read():
    names = sorted(path.relative_to(target).as_posix() for path in target.rglob("*"))
    (text,) = {path.read_text() for path in target.rglob("*") if path.is_file()}
    assert names == sorted(["a", "sub", "sub/b", text]), names
    return text
"""

WITHOUT_EXCHANGE = """
atomic_io._exchange = lambda one, other: False

def recover():
    atomic_io.recover_folder(target)
"""


def test_atomic_write_killed_at_each_system_call(tmp_path):
    kills, recovered = kill_at_each_call(KILLED_FILE, tmp_path)
    assert kills > 10 and recovered == 0


def test_atomic_folder_killed_at_each_system_call(tmp_path):
    kills, recovered = kill_at_each_call(KILLED_FOLDER, tmp_path)
    assert kills > 20 and recovered == 0


def test_atomic_folder_killed_at_each_system_call_of_a_system_without_exchange(tmp_path):
    kills, recovered = kill_at_each_call(KILLED_FOLDER + WITHOUT_EXCHANGE, tmp_path)
    assert kills > 20 and 0 < recovered < kills


def test_atomic_write_leaves_what_living_processes_write(tmp_path):
    with atomic_write(tmp_path / "a") as first, atomic_folder(tmp_path / "b") as second:
        with atomic_write(tmp_path / "c"), atomic_folder(tmp_path / "d"):
            pass
        first.write("a")
        (second / "x").write_text("x")
    assert names(tmp_path) == ["a", "b", "c", "d"] and (tmp_path / "b" / "x").exists()


def test_atomic_write_leaves_the_files_of_others(tmp_path):
    others = [".a.12345678.part", ".a.20260101.old", "a.gpt2jax-12345678.part", ".b.gpt2jax-12345678.old"]
    for name in others:
        (tmp_path / name).write_text("mine")
    (tmp_path / "c").mkdir()
    (tmp_path / ".a.gpt2jax-abcdefgh.part").symlink_to("c")
    (tmp_path / ".a.gpt2jax-abcd_123.part").write_text("left")
    with atomic_write(tmp_path / "a"):
        pass
    assert names(tmp_path) == sorted([*others, ".a.gpt2jax-abcdefgh.part", "a", "c"])


def test_atomic_write_and_folder_take_names_of_255_bytes(tmp_path):
    name = "語" * 85
    with atomic_write(tmp_path / name) as file:
        file.write("x")
    with atomic_folder(tmp_path / name[::-1].replace("語", "文")):
        pass
    assert (tmp_path / name).read_text() == "x" and len(names(tmp_path)) == 2


def no_room(number: int = errno.ENOSPC) -> OSError:
    return OSError(number, os.strerror(number))


@pytest.mark.parametrize(
    "error",
    [
        no_room(),
        no_room(errno.EROFS),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        OSError(
            "Can't write data (file write failed: errno = 28, error message = 'No space left on device')"
        ),
        ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device [os_error_code='28']"),
    ],
    ids=["full", "read-only", "safetensors", "HDF5", "TensorStore"],
)
def test_atomic_io_names_what_cannot_be_written(tmp_path, error):
    message = (
        "(No space left on device; make room there, or|Read-only file system;) choose another folder: '{}'"
    )
    with pytest.raises(OSError, match=message.format(tmp_path / "a")), atomic_write(tmp_path / "a"):
        raise error
    with pytest.raises(OSError, match=message.format(tmp_path / "b")), atomic_folder(tmp_path / "b"):
        raise error
    assert names(tmp_path) == []


def test_atomic_write_on_a_disk_that_is_full(tmp_path):
    """A limit on the size of files, which a process can set for itself, fails as a full disk does."""
    script = (
        "import resource, sys; from gpt2jax.utils.atomic_io import atomic_write\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "with atomic_write(sys.argv[1]) as file: file.write('x' * 100_000)"
    )
    (tmp_path / "a").write_text("old")
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "a")], capture_output=True, text=True)
    assert f"File too large; make room there, or choose another folder: '{tmp_path / 'a'}'" in done.stderr
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


def test_atomic_write_names_a_full_device():
    with pytest.raises(OSError, match="No space left on device; make room there, .*: '/dev/full'"):
        with atomic_write("/dev/full") as file:
            file.write("x")


def test_atomic_io_names_a_file_or_a_dangling_link_where_a_folder_should_be(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "far").symlink_to("no/where")
    (tmp_path / "loop").symlink_to("loop")
    for write in (atomic_write, atomic_folder):
        with pytest.raises(NotADirectoryError, match="file is a file; expected a folder"):
            write(tmp_path / "file" / "a").__enter__()
        for name, where in (("link/b/c", "nowhere"), ("far", "no/where"), ("loop", "loop")):
            with pytest.raises(
                FileNotFoundError,
                match=f"{name.partition('/')[0]} is a link to {where}, which does not exist",
            ):
                write(tmp_path / name).__enter__()
    with atomic_write(tmp_path / "link") as file:  # its folder exists
        file.write("x")
    assert (tmp_path / "nowhere").read_text() == "x"


def test_recover_folder(tmp_path):
    old = tmp_path / ".run.gpt2jax-abcdefgh.old"
    recover_folder(tmp_path / "run")
    old.mkdir()
    recover_folder(tmp_path / "run")  # nothing in it
    (old / "a").write_text("old")
    recover_folder(tmp_path / "runs")
    assert names(tmp_path) == [old.name]
    with pytest.warns(Notice, match="run has its name again: a program was killed"):
        recover_folder(tmp_path / "run")
    assert names(tmp_path) == ["run"] and names(tmp_path / "run") == ["a"]
