"""Reads the token ids of one shard by its file descriptor.

Not through a memory map: where a disk fails or a file was cut short, reading one ends the process
with SIGBUS, and no sentence says which file it was.
"""

import io
import os
import weakref
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


class TokenFile:
    """A `.npy` file of token ids, open as long as this object lives.

    Threads and forked processes may read at the same time: none moves a position of another.
    """

    def __init__(self, path: Path) -> None:
        """Read the header, which says the type and shape, and where the tokens begin.

        Raises:
            ValueError: it is not a whole `.npy` file.
            OSError: it cannot be opened.
        """
        self.path = path
        # NumPy's shortest way to the offset; nothing is read through this map.
        header = np.lib.format.open_memmap(path, mode="r")
        self.dtype, self.shape, self.offset = header.dtype, header.shape, header.offset
        self._file = io.FileIO(path)
        # At the end of the interpreter as well, which warns of files that are left open.
        weakref.finalize(self, self._file.close)

    def read(self, first: int, n: int) -> NDArray[np.integer]:
        """Tokens number `first` to `first + n`, which the file has, (n,), read-only.

        Raises:
            OSError: the disk fails, or the file has become shorter.
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
                    f"{self.path} ends at byte {at} now, before tokens that were to be read; "
                    "restore the file and go on with the same command"
                )
            data += piece
        return np.frombuffer(data, self.dtype)
