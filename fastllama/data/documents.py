"""Reads documents from text, JSON Lines and Parquet files, starting at any position."""

import glob
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
SUFFIXES = (
    ".txt",
    ".jsonl",
    ".parquet",
    *(text + packed for text in (".txt", ".jsonl") for packed in COMPRESSIONS),
)
PARQUET_BATCH_ROWS = 1024
REPORTED_RECORDS = 10


class Position(NamedTuple):
    """The next record to read: record number `record` of file number `file`, both from 0.

    A record is a line of JSON Lines, a row of Parquet, or a whole text file.
    """

    file: int
    record: int


START = Position(0, 0)


@dataclass(frozen=True, slots=True)
class Document:
    """A text, not empty and encodable in UTF-8."""

    text: str
    next: Position
    bytes_read: int  # of all input files so far, before decompression


@dataclass(frozen=True, slots=True)
class Malformed:
    """A record without a readable text, or the unreadable rest of a file."""

    where: str  # file:line, or file:row for Parquet, from 1
    reason: str
    next: Position
    bytes_read: int


@dataclass
class MalformedFilter:
    """Skips malformed records, counts them, and reports the first `REPORTED_RECORDS`."""

    report: Callable[[str], None]
    count: int = 0

    def documents(self, records: Iterable[Document | Malformed]) -> Iterator[Document]:
        """Yield the documents among `records`."""
        for record in records:
            if isinstance(record, Document):
                yield record
                continue
            if self.count < REPORTED_RECORDS:
                self.report(f"{record.where}: {record.reason}")
            self.count += 1


@dataclass(frozen=True, slots=True)
class _Invalid:
    """Why a record has no readable text."""

    reason: str
    fields: tuple[str, ...] | None = None  # of the record, if the text field is missing
    ends_file: bool = False


class _Record(NamedTuple):
    number: int  # from 1
    content: str | _Invalid
    bytes_read: int  # of this file


def find_files(inputs: Sequence[str]) -> list[Path]:
    """Absolute paths of the files in `inputs` (files, folders, glob patterns), sorted, each once.

    Folders are searched recursively. Folders and patterns give only visible files with a suffix in
    `SUFFIXES`.

    Raises:
        ValueError: an input gives no file, or is a file with another suffix.
    """
    found: list[Path] = []
    for value in inputs:
        path = Path(value)
        if path.is_file():
            if not _is_supported(path):
                raise ValueError(
                    f"cannot read {value}: its suffix is not one of {', '.join(SUFFIXES)}"
                )
            found.append(path.absolute())
            continue
        matches = (
            [path] if path.is_dir() else [Path(match) for match in glob.glob(value, recursive=True)]
        )
        files = [file.absolute() for match in matches for file in _files_under(match)]
        if not files:
            raise ValueError(
                f"input {value!r} matches no file: name files, folders or patterns "
                f"with one of the suffixes {', '.join(SUFFIXES)}"
            )
        found += files
    unique: dict[Path, Path] = {}
    for path in sorted(found):
        unique.setdefault(path.resolve(), path)
    return list(unique.values())


def read_documents(
    files: Sequence[Path], field: str = "text", start: Position = START
) -> Iterator[Document | Malformed]:
    """Yield documents and malformed records of `files` in order, beginning at `start`.

    `field` names the text in JSON Lines and Parquet. Empty documents and blank lines are left out.
    To continue after a record, start at its `next`.

    Raises:
        ValueError: the input was read from its beginning to its end and has no document.
        OSError: a file cannot be opened, or the disk fails.
    """
    documents = 0
    field_found = False
    other_fields: set[str] = set()
    first_malformed = ""
    bytes_before = sum(path.stat().st_size for path in files[: start.file])
    for index, path in enumerate(files[start.file :], start.file):
        skip = start.record if index == start.file else 0
        for number, content, bytes_read in _read_file(path, field, skip):
            after = Position(index, number)
            if isinstance(content, str):
                field_found = True
                if content:
                    documents += 1
                    yield Document(content, after, bytes_before + bytes_read)
            else:
                field_found |= content.fields is None
                other_fields.update(content.fields or ())
                if content.ends_file:
                    after = Position(index + 1, 0)
                where = f"{path}:{number}"
                if not first_malformed:
                    first_malformed = f"; the first malformed record is {where}: {content.reason}"
                yield Malformed(where, content.reason, after, bytes_before + bytes_read)
        bytes_before += path.stat().st_size
    if not documents and start == START:
        if not field_found and other_fields:
            raise ValueError(
                f"no record of the input has the field {field!r}: "
                f"choose one of {', '.join(sorted(other_fields))} with --field"
            )
        raise ValueError(
            f"the input has no document: every record is empty or malformed{first_malformed}"
        )


def _is_supported(path: Path) -> bool:
    return path.name.endswith(SUFFIXES)


def _files_under(path: Path) -> list[Path]:
    candidates = [path]
    if path.is_dir():
        pattern = f"{glob.escape(str(path))}/**"
        candidates = [Path(match) for match in glob.glob(pattern, recursive=True)]
    return [file for file in candidates if _is_supported(file) and file.is_file()]


def _read_file(path: Path, field: str, skip: int) -> Iterator[_Record]:
    """Yield the records of one file after the first `skip`. An unreadable rest is one record."""
    if path.suffix == ".parquet":
        records = _read_parquet(path, field, skip)
    elif ".jsonl" in path.suffixes[-2:]:
        records = _read_json_lines(path, field, skip)
    else:
        records = _read_text(path, skip)
    number = skip
    try:
        for record in records:
            number = record.number
            yield record
    except (OSError, pa.ArrowException) as error:
        # Damaged data has no errno. A missing file or a failing disk has one, and must end the
        # reading instead of being skipped as malformed.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = f"the rest of the file cannot be read ({error})"
        yield _Record(number + 1, _Invalid(reason, ends_file=True), path.stat().st_size)


@contextmanager
def _open(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Yield the raw file, whose position tells how much is read, and its decompressed content."""
    compression = COMPRESSIONS.get(path.suffix)
    with open(path, "rb") as raw:
        if compression is None:
            yield raw, raw
            return
        with io.BufferedReader(pa.CompressedInputStream(raw, compression), 2**20) as content:
            yield raw, content


def _read_text(path: Path, skip: int) -> Iterator[_Record]:
    if skip:
        return
    with _open(path) as (raw, content):
        data = content.read()
        size = raw.tell()
    try:
        yield _Record(1, data.decode("utf-8-sig"), size)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        yield _Record(1, _Invalid(f"not UTF-8 in line {line}"), size)


def _read_json_lines(path: Path, field: str, skip: int) -> Iterator[_Record]:
    with _open(path) as (raw, content):
        for number, line in enumerate(content, 1):
            if number > skip and not line.isspace():
                yield _Record(number, _parse_line(line, field), raw.tell())


def _read_parquet(path: Path, field: str, skip: int) -> Iterator[_Record]:
    size = path.stat().st_size
    with pq.ParquetFile(path) as file:
        rows = file.metadata.num_rows
        fields = tuple(file.schema_arrow.names)
        if field not in fields:
            invalid = _missing_field(field, fields)
            for row in range(skip + 1, rows + 1):
                yield _Record(row, invalid, size * row // rows)
            return
        row = 0
        for group in range(file.num_row_groups):
            group_rows = file.metadata.row_group(group).num_rows
            if row + group_rows <= skip:
                row += group_rows
                continue
            for batch in file.iter_batches(PARQUET_BATCH_ROWS, row_groups=[group], columns=[field]):
                for value in batch.column(0):
                    row += 1
                    if row > skip:
                        yield _Record(row, _parse_scalar(value, field), size * row // rows)


def _parse_line(line: bytes, field: str) -> str | _Invalid:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return _Invalid(f"not UTF-8 at byte {error.start}")
    except (ValueError, RecursionError) as error:
        return _Invalid(f"not JSON ({error})")
    if not isinstance(record, dict):
        return _Invalid("not a JSON object")
    if field not in record:
        return _missing_field(field, tuple(record))
    return _check_text(record[field], field)


def _parse_scalar(value: pa.Scalar, field: str) -> str | _Invalid:
    try:
        return _check_text(value.as_py(), field)
    except UnicodeDecodeError as error:
        return _Invalid(f"not UTF-8 at byte {error.start}")


def _missing_field(field: str, fields: tuple[str, ...]) -> _Invalid:
    return _Invalid(f"no field {field!r} among {', '.join(fields) or 'none'}", fields)


def _check_text(value: object, field: str) -> str | _Invalid:
    if value is None:
        return _Invalid(f"field {field!r} is null")
    if not isinstance(value, str):
        return _Invalid(f"field {field!r} is of type {type(value).__name__}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        return _Invalid(f"field {field!r} has a lone surrogate")
    return value
