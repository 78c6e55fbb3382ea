"""Decompresses input files, up to the damage if a file is damaged."""

import bz2
import gzip
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
    """The rest of an input file cannot be used."""


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
    """The decompressed content of `raw`, which `read` returns piece by piece."""

    def __init__(self, raw: IO[bytes], read: Callable[[int], bytes]) -> None:
        self._raw = raw
        self._read = read
        self._bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._read(len(buffer))
        self._bytes += len(data)
        check_expansion(self._bytes, self._raw.tell())
        buffer[: len(data)] = data
        return len(data)


def _decompression(raw: IO[bytes], suffix: str) -> Callable[[int], bytes] | None:
    """A function that returns the next bytes, at most as many as it is told; None for other files.

    It returns everything before damage before it raises, so no whole record is lost.
    """
    match suffix:
        case ".gz":
            return gzip.GzipFile(fileobj=raw).read1
        case ".bz2":
            return bz2.BZ2File(raw).read1
        case ".xz":
            return lzma.LZMAFile(raw).read1
        case ".zst":
            return _Zstd(raw).read1
    return None


class _Zstd:
    def __init__(self, raw: IO[bytes]) -> None:
        self._stream = pa.CompressedInputStream(raw, "zstd")
        self._damage: BaseException | None = None

    def read1(self, size: int) -> bytes:
        if self._damage is not None:
            raise self._damage
        data = bytearray(size)
        try:
            count = self._stream.readinto(data)
        except DAMAGE as damage:
            # Arrow does not say how many bytes it wrote before the damage. Text ends in no NUL.
            self._damage = damage
            count = len(data.rstrip(b"\0"))
            if not count:
                raise
        return bytes(data[:count])
