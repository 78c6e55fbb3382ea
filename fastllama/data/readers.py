"""Reads the records of an input file of any supported format."""

import codecs
import io
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from fastllama.data.decompression import (
    BUFFER_BYTES,
    DAMAGE,
    DamagedInputError,
    decompressed,
    is_damage,
)
from fastllama.data.files import COMPRESSIONS
from fastllama.data.hub import HubShard, read_shard
from fastllama.data.json_records import read_json, read_json_lines
from fastllama.data.parquet_records import read_parquet
from fastllama.data.records import EMPTY, OTHER_ENCODING, NoText, Record, too_long
from fastllama.data.remote_files import RemoteFile
from fastllama.data.trees import InputFile, TreeFile
from fastllama.printable import printable

_GIT_LFS = b"version https://git-lfs.github.com/"
_UTF_16 = "it is UTF-16: convert it to UTF-8, as with `iconv -f UTF-16 -t UTF-8`"
_UTF_32 = "it is UTF-32: convert it to UTF-8, as with `iconv -f UTF-32 -t UTF-8`"
_NOT_TEXT = {
    # Before UTF-16, whose mark begins like this one.
    codecs.BOM_UTF32_LE: _UTF_32,
    codecs.BOM_UTF32_BE: _UTF_32,
    codecs.BOM_UTF16_LE: _UTF_16,
    codecs.BOM_UTF16_BE: _UTF_16,
    b"\x1f\x8b": "it is compressed with gzip: add .gz to its name",
    b"\x28\xb5\x2f\xfd": "it is compressed with zstd: add .zst to its name",
    b"BZh91AY&SY": "it is compressed with bzip2: add .bz2 to its name",
    b"\xfd7zXZ\x00": "it is compressed with xz: add .xz to its name",
    b"PK\x03\x04": "it is a ZIP archive: unpack it",
    b"7z\xbc\xaf\x27\x1c": "it is a 7z archive: unpack it",
    b"%PDF-": "it is a PDF: extract its text, as with `pdftotext`",
    b"ARROW1": "it is an Arrow file: write it as Parquet",
    b"PAR1": "it is Parquet: add .parquet to its name",
}
"""First bytes of a file that is neither text nor JSON, and the remedy."""
_TAR_PLACE, _TAR = 257, b"ustar"
MAX_NUL_SHARE, MAX_NULS = 0.1, 4
"""Text may hold the character U+0000. UTF-16 without a mark holds it at every second byte."""


def read_file(path: InputFile, field: str, skip: int, max_bytes: int) -> Iterator[Record]:
    """Yield the records of one file after the first `skip`. An unreadable rest is the last one.

    Raises:
        ValueError: a file behind a URL is gone, was changed or may not be read.
        OSError: the file cannot be opened, or the disk or the network fails.
    """
    if isinstance(path, HubShard):
        yield from read_shard(path, field, skip, max_bytes)
        return
    number = skip
    with _open(path) as raw:
        try:
            for record in _records(raw, path, field, skip, max_bytes):
                number = record.number
                yield record
        except DAMAGE as error:
            if isinstance(error, OSError) and not is_damage(error):
                raise (_named(error, path) if isinstance(path, Path) else error) from error
            size = size_of(path)
            what = "the rest of the file" if number else "the file"
            lost = error.records if isinstance(error, DamagedInputError) else 1
            if lost > 1:
                what += f", {lost:,} records,"
            place = f", after {raw.tell():,} of {size:,} bytes" if number and raw.tell() else ""
            reason = f"{what} cannot be read{place} ({str(error) or 'out of memory'})"
            yield Record(number + 1, NoText(reason, records=lost, ends_file=True), size)


def size_of(path: InputFile) -> int:
    """The size of a file in bytes; raise an OSError that names it."""
    if not isinstance(path, Path):
        return path.size
    try:
        return path.stat().st_size
    except OSError as error:
        raise _named(error, path) from error


def _open(path: TreeFile) -> io.BufferedReader:
    if isinstance(path, RemoteFile):
        return path.open()
    try:
        return open(path, "rb")
    except OSError as error:
        raise _named(error, path) from error


def _named(error: OSError, path: Path) -> OSError:
    return type(error)(
        f"cannot read {printable(path)}: {error.strerror}; restore it or its permissions, and run "
        "the same command again"
    )


def _records(
    raw: io.BufferedReader, path: TreeFile, field: str, skip: int, max_bytes: int
) -> Iterator[Record]:
    name = path.name.lower()
    if raw.peek(len(_GIT_LFS)).startswith(_GIT_LFS):
        raise DamagedInputError("it is a Git LFS pointer: fetch its content, `git lfs pull`")
    if name.endswith(".parquet"):
        yield from read_parquet(path, field, skip, max_bytes)
        return
    compression = next(filter(name.endswith, COMPRESSIONS), "")
    content = decompressed(raw, compression)
    try:
        first = content.peek(BUFFER_BYTES)
    except DAMAGE as error:
        if not compression or not is_damage(error):
            raise
        raise DamagedInputError(
            f"{error}: it is damaged, or not compressed as {compression} says; fetch it again, or "
            "correct its name"
        ) from error
    for start, problem in _NOT_TEXT.items():
        if first.startswith(start):
            raise DamagedInputError(problem)
    if first.startswith(_TAR, _TAR_PLACE):
        raise DamagedInputError("it is a tar archive: unpack it")
    if first.count(b"\0") > max(MAX_NULS, len(first) * MAX_NUL_SHARE):
        raise DamagedInputError(
            "it is full of NUL bytes, so it is no UTF-8 text: convert it, as with `iconv -f "
            "UTF-16LE -t UTF-8`, or leave it out"
        )
    match name.removesuffix(compression).rsplit(".")[-1]:
        case "json":
            yield from read_json(raw, content, field, skip, max_bytes)
        case "jsonl" | "ndjson":
            yield from read_json_lines(raw, content, field, skip, max_bytes)
        case _ if not skip:
            yield _read_text(raw, content, max_bytes)


def _read_text(raw: IO[bytes], content: io.BufferedReader, max_bytes: int) -> Record:
    data = bytearray()
    while len(data) <= max_bytes and (piece := content.read1(BUFFER_BYTES)):
        data += piece
    if len(data) > max_bytes:
        return Record(1, too_long(max_bytes), raw.tell())
    try:
        return Record(1, data.decode("utf-8-sig") or EMPTY, raw.tell())
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return Record(1, NoText(f"not UTF-8 in line {line}{OTHER_ENCODING}"), raw.tell())
