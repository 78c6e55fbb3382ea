"""A log of a run: whole lines, appended. What an earlier session left in it never ends a run."""

import errno
import io
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fastllama.atomic import fsync_file, set_aside

MAX_BYTES = 2**30
"""Size above which an old log is set aside unread."""

Say = Callable[[str], None]
"""Prints one sentence on the console."""


class LogFile:
    """A log that records are appended to. Records that cannot be written now wait for the next."""

    def __init__(
        self, path: Path, header: bytes = b"", tidy: Callable[[], None] = lambda: None
    ) -> None:
        """Append to `path`; an empty file first gets `header`.

        `tidy` takes from the file what does not belong to the run. It is called again, before the
        first record, until it does not raise.
        """
        self.path = path
        self.n_waiting = 0
        """Records that wait."""
        self._waiting = b""
        self._header = header
        self._tidy = tidy
        self._is_tidy = False

    def write(self, record: bytes) -> None:
        """Append the records that wait and this one with one write. A kill leaves at most a part.

        Raises:
            OSError: the file cannot be written now; the next call writes this record too.
        """
        self._waiting += record
        self.n_waiting += 1
        self.flush()

    def flush(self) -> None:
        """Write the header if it is missing, and the records that wait.

        Raises:
            OSError: as for `write`.
        """
        if not self._is_tidy:
            self._tidy()
            self._is_tidy = True
        is_empty = not self.path.exists() or self.path.stat().st_size == 0
        append(self.path, (self._header if is_empty else b"") + self._waiting)
        self._waiting, self.n_waiting = b"", 0

    def sync(self) -> None:
        """Write the records that wait, and make all records durable.

        Raises:
            OSError: as for `write`.
        """
        self.flush()
        fsync_file(self.path)


def append(path: Path, content: str | bytes) -> None:
    """Append whole lines to a log file in one write, or nothing.

    Raises:
        OSError: the disk is full or read-only, the folder is gone, or `path` is no regular file.
    """
    data = content.encode() if isinstance(content, str) else content
    # Neither through a link out of the folder, nor into a pipe, where opening could wait forever.
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open(path, flags, 0o666)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        try:
            while data:
                data = data[os.write(descriptor, data) :]
        except OSError:
            # A full disk may have stored a part of the lines.
            with suppress(OSError):
                os.ftruncate(descriptor, status.st_size)
            raise
    finally:
        os.close(descriptor)


def old_lines(path: Path, say: Say) -> list[bytes]:
    """The lines of a log, with their ends; none if there is no log.

    A file that cannot be a log is renamed, and `say` is told: one that is not a regular file, or
    that is larger than `MAX_BYTES`.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        status = path.lstat()
    except FileNotFoundError:
        return []
    if not stat.S_ISREG(status.st_mode):
        say(f"{path} is not a regular file; it is kept as {set_aside(path).name}.")
        return []
    if status.st_size > MAX_BYTES:
        say(f"{path} is larger than {MAX_BYTES} bytes; it is kept as {set_aside(path).name}.")
        return []
    return io.BytesIO(path.read_bytes()).readlines()


def keep_lines(
    path: Path, lines: list[bytes], last_step: int, step_of: Callable[[bytes], int], say: Say
) -> list[bytes]:
    """The lines up to update `last_step`; the others move to superseded-<name> beside the log.

    `step_of` returns the update of a line, or raises ValueError if the line is damaged. Damaged and
    partial lines move too, and `say` is told. The caller replaces the file.

    Raises:
        OSError: superseded-<name> cannot be written.
    """
    kept: list[bytes] = []
    moved: list[bytes] = []
    n_damaged = 0
    for line in lines:
        try:
            step = step_of(line) if line.endswith(b"\n") else None
        except ValueError:
            step = None
        n_damaged += step is None
        (moved if step is None or step > last_step else kept).append(line)
    if moved:
        superseded = path.with_name(f"superseded-{path.name}")
        old_lines(superseded, say)
        append(superseded, b"".join(moved).rstrip(b"\n") + b"\n")
    if n_damaged:
        what = "line is" if n_damaged == 1 else "lines are"
        say(f"{path}: {n_damaged} damaged or partial {what} kept in superseded-{path.name}.")
    return kept
