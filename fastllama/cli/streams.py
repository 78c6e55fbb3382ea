"""stdout and stderr that never fail: a command outlives its console.

A log on a full disk, a reader that went away (`| head`), a closed terminal and an encoding without
the character all make `print` raise. That must not end a training, or change an exit code.
"""

import codecs
import errno
import io
import os
import sys
import threading
from contextlib import suppress
from typing import BinaryIO, TextIO, cast

from fastllama.errors import reason
from fastllama.printable import printable

MAX_WAITING = 2**16
"""Bytes that wait for a stream which cannot be written now. Older lines are dropped and counted."""

SPELLINGS = {"…": "..."}
"""Characters of our own texts, for an encoding that lacks them; others get a backslash escape."""


_closed: set[str] = set()
"""Streams that were closed when the process began."""


class PatientFile(io.RawIOBase):
    """A binary file whose `write` never raises.

    Bytes that cannot be written wait, and go first once the file can be written again. A notice in
    the file then tells how many lines were dropped meanwhile.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.error: Exception | None = None
        """Why the last write failed; None if it did not."""
        self._file = file
        self._waiting, self._notice = bytearray(), bytearray()
        self._n_dropped = 0
        # Reentrant: a signal handler may print.
        self._lock = threading.RLock()

    def write(self, data: bytes) -> int:  # type: ignore[override]
        """Write `data`, or let it wait; return its length."""
        with self._lock:
            self._waiting += data
            try:
                self._drain(self._notice)
                self._drain(self._waiting)
                self.error, self._n_dropped = None, 0
            # A ValueError says that the file was closed.
            except (OSError, ValueError) as error:
                self.error = error
                self._drop_old_lines(reason(error))
        return len(data)

    def lost_lines(self) -> int:
        """Lines that were dropped or still wait, a last half line included."""
        half = bool(self._waiting) and not self._waiting.endswith(b"\n")
        return self._n_dropped + self._waiting.count(b"\n") + half

    def why(self) -> str:
        """Why the last write failed."""
        return reason(self.error) if self.error else ""

    def forget(self) -> None:
        """Drop all lines that wait, and do not count them."""
        self._n_dropped = 0
        self._waiting.clear()
        self._notice.clear()

    def _drain(self, content: bytearray) -> None:
        while content:
            written = self._file.write(content)
            if not written:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            del content[:written]

    def _drop_old_lines(self, why: str) -> None:
        if len(self._waiting) <= MAX_WAITING:
            return
        end = self._waiting.find(b"\n", len(self._waiting) - MAX_WAITING) + 1
        end = end or len(self._waiting)
        self._n_dropped += self._waiting.count(b"\n", 0, end)
        del self._waiting[:end]
        notice = f"\n[{self._n_dropped} lines could not be written: {why}]\n"
        self._notice[:] = notice.encode("ascii", "backslashreplace")

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._file.fileno()

    def isatty(self) -> bool:
        return self._file.isatty()


def guard_streams() -> None:
    """Make `sys.stdout` and `sys.stderr` write through a `PatientFile`, in any encoding.

    A stream without a binary file below it, such as `io.StringIO`, cannot fail and stays.
    """
    codecs.register_error("fastllama.spelled", _spelled)
    _open_closed_descriptors()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        buffer = getattr(stream, "buffer", None)
        if buffer is None or isinstance(buffer, PatientFile):
            continue
        with suppress(OSError, ValueError):
            stream.flush()
        file = PatientFile(getattr(buffer, "raw", buffer))
        guarded = io.TextIOWrapper(
            cast(BinaryIO, file),
            encoding=stream.encoding,
            errors="fastllama.spelled",
            line_buffering=True,
        )
        setattr(sys, name, guarded)


def say(text: str, file: TextIO | None = None) -> None:
    """Print a text in which names of files and fields may occur, on stdout unless `file` is given.

    Control characters are shown as escapes.
    """
    print(printable(text, keep="\n"), file=file)


def print_result(text: str, end: str = "\n") -> None:
    """Print text that is a command's result, at once.

    Control characters are shown as escapes on a terminal. A file or a pipe gets the text unchanged.
    """
    on_terminal = sys.stdout.isatty()
    print(printable(text, keep="\n\t") if on_terminal else text, end=end, flush=True)


def report_lost_lines() -> None:
    """Say on stderr how many lines stdout lost, and on stdout how many stderr lost."""
    for name, other in (("stdout", sys.stderr), ("stderr", sys.stdout)):
        file = _patient_file(name)
        if file is not None and (n_lines := file.lost_lines()):
            what = "line" if n_lines == 1 else "lines"
            print(f"{n_lines} {what} for {name} could not be written: {file.why()}", file=other)
            file.forget()


def stdout_fails() -> bool:
    """Whether the last write to stdout failed, so that more output is of no use."""
    file = _patient_file("stdout")
    return file is not None and file.error is not None


def require_stdout() -> None:
    """Check that stdout took everything. For commands whose result is their output.

    A reader that went away wanted no more; this is no error.

    Raises:
        OSError: stdout could not be written.
    """
    if "stdout" in _closed:
        raise OSError("The output could not be written to stdout: it is closed.")
    file = _patient_file("stdout")
    if file is None or not file.lost_lines():
        return
    file.forget()
    if not isinstance(file.error, BrokenPipeError):
        raise OSError(f"The output could not be written to stdout: {file.why()}.")


def _patient_file(name: str) -> PatientFile | None:
    buffer = getattr(getattr(sys, name), "buffer", None)
    return buffer if isinstance(buffer, PatientFile) else None


def _open_closed_descriptors() -> None:
    """Open the null device in place of a closed stdin, stdout or stderr (`2>&-`).

    Otherwise the next file that is opened, such as a checkpoint, would take its number, and
    messages to stderr would go into this file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # `open` returns the lowest free number.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            _closed.add(name)
            stream = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115
            setattr(sys, name, stream)
            # As Python does for others: a stream without a reference would be closed.
            setattr(sys, f"__{name}__", stream)


def _spelled(error: UnicodeError) -> tuple[str | bytes, int]:
    """Error handler of an encoding: `SPELLINGS`, otherwise Python's backslash escape."""
    if isinstance(error, UnicodeEncodeError):
        character = error.object[error.start]
        if character in SPELLINGS:
            return SPELLINGS[character], error.start + 1
        error.end = error.start + 1
    return codecs.backslashreplace_errors(error)
