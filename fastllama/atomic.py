"""Atomic file writes, and a lock that lets one process at a time write into a folder.

A file system may have no locks, no flush of a folder, or no rename over a file that is open. Each
has a fallback here, reported once per process.
"""

import errno
import fcntl
import os
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from fastllama.printable import printable

LOCK_FILE = ".lock"

RENAME_TRIES = 5
RENAME_PAUSE_S = 0.2
# SMB and shared folders of virtual machines refuse to rename a file, or over a file, that a reader
# has open.
_OPEN_ELSEWHERE = (errno.EACCES, errno.EPERM, errno.EBUSY, errno.ETXTBSY)
_NO_RENAME_OVER = (*_OPEN_ELSEWHERE, errno.EEXIST)
_NO_FLUSH = (
    *(errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP),
    *(errno.EACCES, errno.EPERM, errno.EBADF),
)

_reported: set[str] = set()


def report_once(subject: str, sentence: str) -> None:
    """Print `sentence` on stderr, the first time that `subject` is reported by this process."""
    if subject in _reported:
        return
    _reported.add(subject)
    # A console that is gone ends nothing.
    with suppress(OSError, ValueError):
        print(printable(sentence), file=sys.stderr, flush=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add `path` to an error of the system that names no file, such as that of a write."""
    try:
        yield
    except OSError as error:
        if error.errno and not isinstance(error.filename, (str, bytes, os.PathLike)):
            error.filename = str(path)
        raise


@contextmanager
def _flush_may_be_unsupported(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_FLUSH:
            raise
        report_once(
            "flush",
            f"{path} cannot be flushed to the disk ({error.strerror}); a power cut may lose the "
            "newest files here.",
        )


def fsync_folder(folder: Path) -> None:
    """Flush the names in `folder` to the disk. Only then does a rename survive a power cut."""
    fsync_file(folder)


def fsync_file(path: Path) -> None:
    """Flush what was written into `path` to the disk."""
    with naming(path), _flush_may_be_unsupported(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock `folder` so that no second process writes into it.

    The lock ends with the process; its file, `LOCK_FILE`, stays. Delete the file only together
    with the folder and while holding the lock. A folder that is not writable, as on a read-only
    disk, needs no lock and gets none. Where the file system has no locks, the folder is used
    without one.

    Raises:
        ValueError: another process holds the lock.
    """
    descriptor = _open_lock(folder)
    if descriptor is None:
        yield
        return
    try:
        if not _acquire(descriptor, folder):
            raise ValueError(
                f"another process is writing into {folder}: wait until it exits, or stop it"
            )
        yield
    finally:
        os.close(descriptor)


def _open_lock(folder: Path) -> int | None:
    """Open the lock file of `folder`; None if the folder cannot be locked."""
    path = folder / LOCK_FILE
    # NFS shares a lock between nodes only on a file open for writing, not on a folder. The lock
    # file of another user can be locked elsewhere though it is read-only.
    for flags in (os.O_RDWR | os.O_CREAT, os.O_RDONLY):
        try:
            if path.is_symlink():
                path.unlink()
            return os.open(path, flags | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            failure = error
    if os.access(folder, os.W_OK):
        _report_no_lock(folder, failure)
    return None


def _acquire(descriptor: int, folder: Path) -> bool:
    """Try to lock the open lock file of `folder`. Return False if another process has the lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The folder may have been deleted since the file was opened, and even created again. A
        # lock on the deleted file protects nothing.
        return os.path.samestat(os.fstat(descriptor), os.stat(folder / LOCK_FILE))
    except OSError as error:
        # SMB answers EACCES when another process has the lock.
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.ENOENT):
            return False
        _report_no_lock(folder, error)
        return True


def _report_no_lock(folder: Path, error: OSError) -> None:
    report_once(
        "lock",
        f"{folder} cannot be locked ({error.strerror}); do not start a second process that writes "
        "into it.",
    )


def open_new(path: Path) -> BinaryIO:
    """Open a new file for writing. A file or link with its name is removed, never written into."""
    path.unlink(missing_ok=True)
    # Mode x also fails on a link that appears in between.
    return open(path, "xb")


def no_links(path: str, flags: int) -> int:
    """An `opener` for open() that raises OSError if `path` is a symbolic link."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content` in one step: an interruption leaves the old or the new file.

    Writes a temporary file beside `path`, flushes it to the disk, and renames it.
    """
    data = content.encode() if isinstance(content, str) else content
    partial = path.with_name(f".{path.name}.partial")
    if is_folder(partial):
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with naming(path), open_new(partial) as file:
            file.write(data)
            file.flush()
            with _flush_may_be_unsupported(path):
                os.fsync(file.fileno())
        _replace_file(partial, path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    fsync_folder(path.parent)


def replace(source: Path, target: Path) -> None:
    """Rename `source` to `target`, and try again for a second while a reader has one of them open.

    Raises:
        OSError: as os.replace.
    """
    for _ in range(RENAME_TRIES - 1):
        try:
            return os.replace(source, target)
        except OSError as error:
            if error.errno not in _OPEN_ELSEWHERE:
                raise
        time.sleep(RENAME_PAUSE_S)
    os.replace(source, target)


def _replace_file(source: Path, target: Path) -> None:
    """Replace the file `target` by `source`, in two steps where one is impossible."""
    try:
        return replace(source, target)
    except OSError as error:
        if error.errno not in _NO_RENAME_OVER or not target.is_file():
            raise
        reason = error.strerror
    old = target.with_name(f".{target.name}.replaced")
    old.unlink(missing_ok=True)
    os.replace(target, old)
    try:
        os.replace(source, target)
    except OSError:
        os.replace(old, target)
        raise
    old.unlink()
    report_once(
        "rename",
        f"{target} cannot be replaced in one step ({reason}); if fastllama is killed in between, "
        f"the old file is left as {old.name}.",
    )


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder, and not a link to one."""
    return path.is_dir() and not path.is_symlink()


def set_aside(path: Path) -> Path:
    """Rename a file or folder that is not used, so that it neither counts nor is overwritten.

    It stays on disk: it may be worth a rescue, or belong to somebody else.
    """
    number = 1
    while os.path.lexists(aside := path.with_name(f"passed-over-{path.name}-{number}")):
        number += 1
    replace(path, aside)
    fsync_folder(path.parent)
    return aside
