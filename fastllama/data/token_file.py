"""Reads the token ids of one shard with `pread`.

A memory map would end the process with SIGBUS, without naming the file, where the disk fails or the
file was truncated.
"""

import io
import os
import re
import stat
import weakref
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastllama.atomic import naming

HEADER_BYTES = 128
"""Bytes before the tokens in the shards that `fastllama prepare` writes."""
MAX_HEADER_BYTES = 4096
# NumPy's own parser evaluates the header as Python, and fails in many ways on a damaged one.
HEADER = re.compile(
    rb"\x93NUMPY\x01\x00(?P<length>..)"
    rb"\{'descr': '(?P<dtype>[<>][iufc]\d{1,2}|\|[biu]1)', 'fortran_order': False, "
    rb"'shape': \((?P<shape>[\d, ]*)\), \} *\n",
    re.DOTALL,
)


class TokenFile:
    """A `.npy` file of token ids, open as long as this object lives.

    Threads and forked processes may read at the same time: reads share no file position.
    """

    def __init__(self, path: Path) -> None:
        """Read the header: `dtype` and `shape`. The tokens follow it.

        Raises:
            ValueError: the file is not a regular file, or has no header of a NumPy array.
            OSError: the file cannot be opened.
        """
        self.path = path
        self._file = _open_regular(path)
        status = os.fstat(self._file.fileno())
        self.stamp = status.st_size, status.st_mtime_ns
        """Size in bytes and time of the last change, when the file was opened."""
        # Also runs when the interpreter exits, which would warn about an open file.
        weakref.finalize(self, self._file.close)
        self.header, self.dtype, self.shape = _parse_header(self._pread(MAX_HEADER_BYTES, 0))

    def read(self, first: int, n: int) -> NDArray[np.integer]:
        """Tokens [first, first + n) as a read-only array (n,).

        Raises:
            OSError: the disk fails, or the file ends before these tokens.
        """
        at = len(self.header) + first * self.dtype.itemsize
        data = self._pread(n * self.dtype.itemsize, at)
        if len(data) < n * self.dtype.itemsize:
            raise OSError(
                f"{self.path} ends at byte {at + len(data)}, before the end of the requested "
                "tokens; restore the file and run the same command again"
            )
        return np.frombuffer(data, self.dtype)

    def _pread(self, n: int, at: int) -> bytes:
        """Bytes [at, at + n), fewer at the end of the file."""
        data = b""
        while len(data) < n:
            with naming(self.path):
                piece = os.pread(self._file.fileno(), n - len(data), at + len(data))
            if not piece:
                break
            data += piece
        return data


def _open_regular(path: Path) -> io.FileIO:
    # Without O_NONBLOCK, opening a named pipe waits for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("not a regular file")
    return io.FileIO(descriptor)


def _parse_header(start: bytes) -> tuple[bytes, np.dtype, tuple[int, ...]]:
    """The header that `start` begins with, and the dtype and shape in it."""
    match = HEADER.match(start)
    if not start.startswith(b"\x93NUMPY"):
        raise ValueError("no header of a NumPy array")
    if match is None or int.from_bytes(match["length"], "little") != match.end() - 10:
        raise ValueError("its header is not one of version 1 for numbers in C order")
    try:
        dtype = np.dtype(match["dtype"].decode())
    except TypeError:
        raise ValueError(f"unknown dtype {match['dtype'].decode()}") from None
    return match[0], dtype, tuple(int(n) for n in re.findall(rb"\d+", match["shape"]))
