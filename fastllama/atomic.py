"""Files that are either the old version or the complete new one, whatever kills the process."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK_FILE = ".lock"


def fsync_folder(folder: Path) -> None:
    """Make the names inside `folder` durable: a rename survives a power cut only after this."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second process from writing into `folder`; the lock ends with the process.

    The file that is locked, `LOCK_FILE`, stays: only who removes the folder may remove it, and
    while the lock is held. Where nothing can be written, as with data on a read-only disk, no lock
    is needed and none is taken.

    Raises:
        ValueError: another process holds it.
    """
    path = folder / LOCK_FILE
    try:
        # NFS keeps a lock between nodes on a file that is open for writing, but not on a folder.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:
        if os.access(folder, os.W_OK):
            raise
        descriptor = -1
    if descriptor < 0:
        yield
        return
    try:
        if not _take(descriptor, path):
            raise ValueError(
                f"another process is writing into {folder}: wait until it ends, or stop it"
            )
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int, path: Path) -> bool:
    """Whether the lock on the file at `path`, opened as `descriptor`, is this process's now."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Since it was opened the folder may have been removed, and another made in its place.
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except (BlockingIOError, FileNotFoundError):
        return False


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write `content` beside `path`, make it durable, then rename it into place."""
    data = content.encode() if isinstance(content, str) else content
    aside = path.with_name(f".{path.name}.partial")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    fsync_folder(path.parent)
