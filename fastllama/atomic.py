"""Atomic file writes, and a lock that lets one process at a time write into a folder."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK_FILE = ".lock"


def fsync_folder(folder: Path) -> None:
    """Flush the names in `folder` to the disk. Only then does a rename survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock `folder` so that no second process writes into it.

    The lock ends with the process; its file, `LOCK_FILE`, stays. Delete the file only together
    with the folder and while holding the lock. A folder that is not writable, as on a read-only
    disk, needs no lock and gets none.

    Raises:
        ValueError: another process holds the lock.
    """
    path = folder / LOCK_FILE
    try:
        # NFS shares a lock between nodes only on a file open for writing, not on a folder.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:
        if os.access(folder, os.W_OK):
            raise
        descriptor = -1
    if descriptor < 0:
        yield
        return
    try:
        if not _acquire(descriptor, path):
            raise ValueError(
                f"another process is writing into {folder}: wait until it exits, or stop it"
            )
        yield
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, path: Path) -> bool:
    """Try to lock the file `descriptor`, opened at `path`. Return whether this process has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The folder may have been deleted since the file was opened, and even created again. A
        # lock on the deleted file protects nothing.
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except (BlockingIOError, FileNotFoundError):
        return False


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content` in one step: an interruption leaves the old or the new file.

    Writes a temporary file beside `path`, flushes it to the disk, and renames it.
    """
    data = content.encode() if isinstance(content, str) else content
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    fsync_folder(path.parent)
