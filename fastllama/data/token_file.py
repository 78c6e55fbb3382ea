"""Reads the token ids of one shard with `pread`.

A memory map would end the process with SIGBUS, without naming the file, where the disk fails or the
file was truncated.
"""

import io
import os
import weakref
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


class TokenFile:
    """A `.npy` file of token ids, open as long as this object lives.

    Threads and forked processes may read at the same time: reads share no file position.
    """

    def __init__(self, path: Path) -> None:
        """Read dtype, shape and data offset from the header.

        Raises:
            ValueError: the file is not a whole `.npy` file.
            OSError: the file cannot be opened.
        """
        self.path = path
        # NumPy gives the offset only with a map. No token is read through it.
        header = np.lib.format.open_memmap(path, mode="r")
        self.dtype, self.shape, self.offset = header.dtype, header.shape, header.offset
        self._file = io.FileIO(path)
        # Also runs when the interpreter exits, which would warn about an open file.
        weakref.finalize(self, self._file.close)

    def read(self, first: int, n: int) -> NDArray[np.integer]:
        """Tokens [first, first + n) as a read-only array (n,).

        Raises:
            OSError: the disk fails, or the file ends before these tokens.
        """
        position, end = (self.offset + i * self.dtype.itemsize for i in (first, first + n))
        data = b""
        while position + len(data) < end:
            at = position + len(data)
            try:
                piece = os.pread(self._file.fileno(), end - at, at)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.path)) from None
            if not piece:
                raise OSError(
                    f"{self.path} ends at byte {at}, before the end of the requested tokens; "
                    "restore the file and run the same command again"
                )
            data += piece
        return np.frombuffer(data, self.dtype)
