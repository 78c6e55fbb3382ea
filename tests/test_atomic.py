"""The lock of a folder, and atomic writes."""

import errno
import fcntl
import io
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastllama import atomic
from fastllama.atomic import locked, no_links, set_aside, write_atomic

BUSY = "another process is writing into"


@pytest.fixture(autouse=True)
def nothing_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what this process has reported."""
    monkeypatch.setattr(atomic, "_reported", set())


def refuse(number: int) -> Callable[..., Any]:
    """A function of the system that fails with this errno."""

    def fail(*arguments: Any, **keywords: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


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
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    writable: bool,
) -> None:
    monkeypatch.setattr(atomic.os, "open", refuse(errno.EROFS))
    monkeypatch.setattr(atomic.os, "access", lambda *arguments: writable)
    with locked(tmp_path):
        pass
    reported = f"{tmp_path} cannot be locked (Read-only file system)"
    assert (reported in capsys.readouterr().err) == writable


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL])
def test_missing_lock_is_reported_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
) -> None:
    monkeypatch.setattr(atomic.fcntl, "flock", refuse(number))
    for _ in range(2):
        with locked(tmp_path):
            pass
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"{tmp_path} cannot be locked ({os.strerror(number)}); do not start a second process that "
        "writes into it."
    )


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES])
def test_refused_lock_is_held_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(atomic.fcntl, "flock", refuse(number))
    with pytest.raises(ValueError, match=BUSY), locked(tmp_path):
        pass


def test_lock_file_that_cannot_be_written_still_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".lock").touch()
    original = os.open

    def of_another_user(path: Any, flags: int, *mode: int) -> int:
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return original(path, flags, *mode)

    monkeypatch.setattr(atomic.os, "open", of_another_user)
    with locked(tmp_path), pytest.raises(ValueError, match=BUSY), locked(tmp_path):
        pass


def test_folder_named_like_the_lock_file_still_locks(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with locked(tmp_path), pytest.raises(ValueError, match=BUSY), locked(tmp_path):
        pass


def test_linked_lock_file_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / ".lock").symlink_to("../outside")
    with locked(folder), pytest.raises(ValueError, match=BUSY), locked(folder):
        pass
    assert not (tmp_path / "outside").exists()


def test_failed_write_leaves_no_partial_file(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    (taken / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="taken"):
        write_atomic(taken, "content")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize("leftover", ["link", "dangling link", "file", "folder"])
def test_leftover_partial_file_is_never_written_into(tmp_path: Path, leftover: str) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    folder.mkdir()
    outside.write_text("kept")
    partial = folder / ".config.toml.partial"
    if leftover == "folder":
        partial.mkdir()
    elif leftover == "file":
        os.link(outside, partial)
    else:
        partial.symlink_to(outside if leftover == "link" else tmp_path / "nothing")
    write_atomic(folder / "config.toml", "new")
    assert (folder / "config.toml").read_text() == "new"
    assert outside.read_text() == "kept"
    assert not (tmp_path / "nothing").exists()
    left = {"config.toml", partial.name} if leftover == "folder" else {"config.toml"}
    assert {path.name for path in folder.iterdir()} == left


def test_linked_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("kept")
    (tmp_path / "file").symlink_to("outside")
    write_atomic(tmp_path / "file", "new")
    assert (tmp_path / "outside").read_text() == "kept"
    assert not (tmp_path / "file").is_symlink()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EACCES])
def test_missing_flush_is_reported_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
) -> None:
    monkeypatch.setattr(atomic.os, "fsync", refuse(number))
    for name in ("one", "two"):
        write_atomic(tmp_path / name, name)
        assert (tmp_path / name).read_text() == name
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"{tmp_path / 'one'} cannot be flushed to the disk ({os.strerror(number)}); "
    )


def test_failed_flush_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic.os, "fsync", refuse(errno.EIO))
    with pytest.raises(OSError, match=r"Input/output error: '.*/file'"):
        write_atomic(tmp_path / "file", "content")
    assert not list(tmp_path.iterdir())


def test_unreadable_folder_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic.os, "open", refuse(errno.EACCES))
    write_atomic(tmp_path / "file", "content")
    assert (tmp_path / "file").read_text() == "content"


def open_in_a_reader(
    monkeypatch: pytest.MonkeyPatch, number: int, path: Path, tries: int
) -> list[Path]:
    """Refuse to rename over `path`, the first `tries` times; return the targets of renames."""
    original, renamed = os.replace, []

    def replace(source: Path, target: Path) -> None:
        renamed.append(target)
        if path.exists() and target == path and renamed.count(path) <= tries:
            raise OSError(number, os.strerror(number))
        original(source, target)

    monkeypatch.setattr(atomic.os, "replace", replace)
    monkeypatch.setattr(atomic, "RENAME_PAUSE_S", 0)
    return renamed


def test_rename_waits_for_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    renamed = open_in_a_reader(monkeypatch, errno.EBUSY, path, tries=2)
    write_atomic(path, "new")
    assert path.read_text() == "new"
    assert renamed == [path] * 3


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EBUSY, errno.EEXIST])
def test_missing_rename_over_a_file_is_reported_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
) -> None:
    path = tmp_path / "file"
    open_in_a_reader(monkeypatch, number, path, tries=100)
    for content in ("first", "second", "third"):
        write_atomic(path, content)
        assert path.read_text() == content
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{path} cannot be replaced in one step ({os.strerror(number)}); ")


def test_failed_rename_restores_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    original = os.replace

    def replace(source: Path, target: Path) -> None:
        if source.name.endswith(".partial"):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        original(source, target)

    monkeypatch.setattr(atomic.os, "replace", replace)
    monkeypatch.setattr(atomic, "RENAME_PAUSE_S", 0)
    with pytest.raises(OSError, match="Operation not permitted"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_set_aside_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "passed-over-file-1").symlink_to("nothing")
    (tmp_path / "file").write_text("kept")
    assert set_aside(tmp_path / "file").name == "passed-over-file-2"
    assert (tmp_path / "passed-over-file-1").is_symlink()
    assert (tmp_path / "passed-over-file-2").read_text() == "kept"


def test_appending_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("kept")
    (tmp_path / "log").symlink_to("outside")
    with pytest.raises(OSError, match="log"):
        os.close(no_links(str(tmp_path / "log"), os.O_WRONLY))
    with open(tmp_path / "new", "a", opener=no_links) as file:
        file.write("row")
    assert (tmp_path / "new").read_text() == "row"


def test_console_that_is_gone_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = io.StringIO()
    gone.close()
    monkeypatch.setattr(atomic.fcntl, "flock", refuse(errno.ENOSYS))
    monkeypatch.setattr(sys, "stderr", gone)
    with locked(tmp_path):
        pass
