from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from gpt2jax.utils.atomic_io import atomic_folder, atomic_write


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
    with pytest.raises(OSError, match="no"), atomic_folder(target, overwrite=True) as folder:
        (folder / "new").write_text("")
    assert (target / "a").read_text() == "old"
    assert names(tmp_path) == ["run"]
