"""Decompresses input files, up to the damage if a file is damaged."""

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from typing import IO, Any

import pyarrow as pa

BUFFER_BYTES = 2**20
EXPANSION_FROM = 2**26
MAX_EXPANSION = 2000
"""Content above `EXPANSION_FROM` bytes may be this many times as large as its compressed form.

gzip reaches about 1030; zstd, bzip2, xz and the encodings of Parquet have no such limit."""


class DamagedInputError(Exception):
    """The rest of an input file, `records` records as far as is known, cannot be used."""

    def __init__(self, reason: str, records: int = 1) -> None:
        super().__init__(reason)
        self.records = records


DAMAGE = (
    DamagedInputError,
    OSError,  # also what gzip, bz2 and Arrow raise, without an errno
    EOFError,
    MemoryError,
    UnicodeDecodeError,  # of a column's name
    zlib.error,
    lzma.LZMAError,
    pa.ArrowException,
)
"""What reading a damaged file may raise."""


def is_damage(error: BaseException) -> bool:
    """Whether the data caused this error of `DAMAGE`, not a missing file or a failing disk.

    Only the latter have an errno. They must end the reading instead of being skipped as malformed.
    """
    return not isinstance(error, OSError) or error.errno is None


def decompressed(raw: io.BufferedReader, suffix: str) -> io.BufferedReader:
    """The content of the file `raw`, whose suffix, in lower case, tells its compression."""
    read = _decompression(raw, suffix)
    return raw if read is None else io.BufferedReader(_Decompressed(raw, read), BUFFER_BYTES)


def check_expansion(content_bytes: int, compressed_bytes: int) -> None:
    """Raise DamagedInputError if data expands like a decompression bomb."""
    if content_bytes > max(EXPANSION_FROM, MAX_EXPANSION * compressed_bytes):
        raise DamagedInputError(
            f"{compressed_bytes:,} bytes expand to more than {content_bytes:,}, as in a "
            "decompression bomb: write the text to an uncompressed file if it is meant"
        )


class _Decompressed(io.RawIOBase):
    """The decompressed content of `raw`, which `read` writes into buffers."""

    def __init__(self, raw: IO[bytes], read: Callable[[Any], int]) -> None:
        self._raw = raw
        self._read = read
        self._bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._read(buffer)
        self._bytes += count
        check_expansion(self._bytes, self._raw.tell())
        return count


def _decompression(raw: IO[bytes], suffix: str) -> Callable[[Any], int] | None:
    """A function that fills a buffer and returns the number of bytes; None for other files.

    It returns everything before damage before it raises, so no whole record is lost.
    """
    match suffix:
        case ".gz":
            return _Arrow(raw, "gzip").readinto
        case ".bz2":
            return bz2.BZ2File(raw).readinto1
        case ".xz":
            return lzma.LZMAFile(raw).readinto1
        case ".zst":
            return _Arrow(raw, "zstd").readinto
    return None


class _Arrow:
    """Decompresses with Arrow, faster than the standard library."""

    def __init__(self, raw: IO[bytes], compression: str) -> None:
        self._stream = pa.CompressedInputStream(raw, compression)
        self._damage: BaseException | None = None

    def readinto(self, buffer: Any) -> int:
        if self._damage is not None:
            raise self._damage
        buffer[:] = bytes(len(buffer))
        try:
            return self._stream.readinto(buffer)
        except DAMAGE as damage:
            # Arrow does not say how many bytes it wrote before the damage. Text ends in no NUL.
            self._damage = damage
            count = len(bytes(buffer).rstrip(b"\0"))
            if not count:
                raise
            return count
