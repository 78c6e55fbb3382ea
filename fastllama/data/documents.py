"""Reads documents from text, JSON and Parquet files, starting at any position."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fastllama.data.hub import HubShard
from fastllama.data.readers import read_file, size_of
from fastllama.data.records import MAX_DOCUMENT_MB, list_fields
from fastllama.data.trees import InputFile
from fastllama.printable import one_line, printable, shortened

MAX_FIELDS = 1000
FIELD_CHARACTERS = 100
REASON_CHARACTERS = 400


class Position(NamedTuple):
    """The next record to read: record number `record` of file number `file`, both from 0.

    A record is a line of JSON Lines, a value of a JSON file, a row of Parquet, or a text file.
    """

    file: int
    record: int


START = Position(0, 0)


@dataclass(frozen=True, slots=True)
class Document:
    """A text, not empty and encodable in UTF-8."""

    text: str
    file: int
    next: Position
    bytes_read: int  # of all input files so far, before decompression


@dataclass(frozen=True, slots=True)
class Empty:
    """A document without text, or a file without records."""

    file: int
    next: Position
    bytes_read: int


@dataclass(frozen=True, slots=True)
class Malformed:
    """Records without a readable text, or the unreadable rest of a file. All text is printable."""

    where: str  # file:line, file:row for Parquet or file:record for a JSON array, from 1
    reason: str
    records: int
    file: int
    next: Position
    bytes_read: int


def read_documents(
    files: Sequence[InputFile],
    field: str = "text",
    start: Position = START,
    max_document_mb: int = MAX_DOCUMENT_MB,
    *,
    may_be_empty: bool = False,
) -> Iterator[Document | Empty | Malformed]:
    """Yield the records of `files` in order, beginning at `start`.

    `field` names the text in JSON and Parquet. Blank lines are left out. A line, row or text file
    of more than `max_document_mb` is malformed. To continue after a record, start at its `next`.

    Raises:
        ValueError: the input was read from its beginning to its end and has no document, unless it
            `may_be_empty`, `max_document_mb` is not positive, or a file behind a URL is gone,
            changed or may not be read.
        OSError: a file cannot be opened, or the disk or the network fails.
    """
    if max_document_mb < 1:
        raise ValueError(f"--max-document-mb {max_document_mb} is not a positive number")
    for source in {path.source for path in files if isinstance(path, HubShard)}:
        source.check_field(field)
    documents = 0
    field_found = field_missing = False
    other_fields: dict[str, None] = {}
    first_malformed = ""
    bytes_before = sum(map(size_of, files[: start.file]))
    for index, path in enumerate(files[start.file :], start.file):
        skip = start.record if index == start.file else 0
        number = skip
        for number, content, bytes_in_file in read_file(path, field, skip, max_document_mb * 10**6):
            after = Position(index, number)
            bytes_read = bytes_before + bytes_in_file
            if isinstance(content, str):
                documents += 1
                yield Document(content, index, after, bytes_read)
                continue
            if content.fields is None:
                field_found = True
            else:
                field_missing = True
                if len(other_fields) < MAX_FIELDS:
                    names = (name[:FIELD_CHARACTERS] for name in content.fields[:MAX_FIELDS])
                    other_fields.update(dict.fromkeys(names))
            if content.ends_file:
                after = Position(index + 1, 0)
            if not content.malformed:
                yield Empty(index, after, bytes_read)
                continue
            where = f"{shortened(printable(path), 300)}:{number}"
            reason = one_line(content.reason, REASON_CHARACTERS)
            if not first_malformed:
                first_malformed = f"; the first malformed record is {where}: {reason}"
            yield Malformed(where, reason, content.records, index, after, bytes_read)
        bytes_before += size_of(path)
        if not number:
            yield Empty(index, Position(index + 1, 0), bytes_before)
    if not documents and start == START and not may_be_empty:
        if field_missing and not field_found:
            remedy = (
                f": choose one of {list_fields(sorted(other_fields))} with --field"
                if other_fields
                else ' or another field with text: write each text as {"text": "…"} in JSON Lines'
            )
            raise ValueError(f"no record of the input has the field {field!r}{remedy}")
        raise ValueError(
            f"the input has no document: every record is empty or malformed{first_malformed}"
        )
