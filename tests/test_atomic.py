"""The lock of a folder, and atomic writes."""

import errno
import fcntl
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from fastllama import atomic
from fastllama.atomic import locked, write_atomic

BUSY = "another process is writing into"


def test_lock_is_exclusive(tmp_path: Path) -> None:
    for _ in range(2):
        with locked(tmp_path), pytest.raises(ValueError, match=BUSY), locked(tmp_path):
            pass
        # The lock file stays and locks nothing.
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_locks_a_file_open_for_writing(tmp_path: Path) -> None:
    with locked(tmp_path):
        folder = os.open(tmp_path, os.O_RDONLY)
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(folder)
        lock = str((tmp_path / ".lock").resolve())
        (number,) = (
            link.name
            for link in Path("/proc/self/fd").iterdir()
            if link.is_symlink() and os.readlink(link) == lock
        )
        flags = int(
            Path(f"/proc/self/fdinfo/{number}").read_text().split("flags:")[1].split()[0], 8
        )
    assert flags & os.O_ACCMODE == os.O_RDWR


@pytest.mark.parametrize("recreated", [False, True])
def test_lock_fails_in_removed_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recreated: bool
) -> None:
    folder, flock = tmp_path / "folder", fcntl.flock
    folder.mkdir()

    def remove_then_flock(*arguments: Any) -> None:
        shutil.rmtree(folder)
        if recreated:
            folder.mkdir()
            (folder / ".lock").touch()
        flock(*arguments)

    monkeypatch.setattr(atomic.fcntl, "flock", remove_then_flock)
    with pytest.raises(ValueError, match=BUSY), locked(folder):
        pass


@pytest.mark.parametrize("writable", [False, True])
def test_read_only_folder_needs_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writable: bool
) -> None:
    def fail(*arguments: Any) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(atomic.os, "open", fail)
    monkeypatch.setattr(atomic.os, "access", lambda *arguments: writable)
    if writable:
        with pytest.raises(OSError, match="Read-only"), locked(tmp_path):
            pass
    else:
        with locked(tmp_path):
            pass


def test_failed_write_leaves_no_partial_file(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    (taken / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="taken"):
        write_atomic(taken, "content")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
