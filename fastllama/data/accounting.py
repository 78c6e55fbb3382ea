"""Counts what became of every input file, and of every record."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from fastllama.data.documents import Document, Empty, Malformed
from fastllama.data.files import InputFiles
from fastllama.printable import printable, shortened

REPORTED_RECORDS = 10
LISTED_FILES = 10


@dataclass
class FileCounts:
    """The records of one input file so far."""

    file: int  # its place among the input files, from 0
    documents: int = 0
    empty: int = 0
    malformed: int = 0
    problem: str = ""  # of the first malformed record

    @property
    def is_complete(self) -> bool:
        """Whether every record was a document."""
        return bool(self.documents) and not self.empty and not self.malformed


@dataclass
class ReadCounts:
    """The records of all input files so far. `prepare` records it in its progress."""

    documents: int = 0
    empty: int = 0
    malformed: int = 0
    files: list[FileCounts] = field(default_factory=list)
    """The first `LISTED_FILES` files that lost records, and last, the file being read."""
    unlisted: int = 0
    """Other files that lost records."""


class Accounting:
    """Passes documents on, counts all records, and reports the first malformed ones."""

    def __init__(self, report: Callable[[str], None], counts: ReadCounts | None = None) -> None:
        self.counts = ReadCounts() if counts is None else counts
        self._report = report

    def documents(self, records: Iterable[Document | Empty | Malformed]) -> Iterator[Document]:
        """Yield the documents among `records`."""
        for record in records:
            counts, file = self.counts, self._counts_of(record.file)
            if isinstance(record, Document):
                file.documents += 1
                counts.documents += 1
                yield record
            elif isinstance(record, Empty):
                file.empty += 1
                counts.empty += 1
            else:
                if counts.malformed < REPORTED_RECORDS:
                    self._report(f"{record.where}: {record.reason}")
                number = record.where.rpartition(":")[2]
                file.problem = file.problem or f"{number}: {record.reason}"
                file.malformed += record.records
                counts.malformed += record.records

    def summary(self, files: InputFiles) -> list[str]:
        """One line on all of `files`, one for each that lost records, one on what is left out."""
        self._close_last_file()
        counts = self.counts
        lines = [f"{_number(len(files.paths), 'file')} read: {_describe(counts)}"]
        for file in counts.files:
            name = shortened(printable(files.paths[file.file]), 300)
            first = f"; first at {file.problem}" if file.problem else ""
            lines.append(f"  {name}: {_describe(file)}{first}")
        if counts.unlisted:
            lines.append(f"  {_number(counts.unlisted, 'more file')} with records lost")
        if left_out := files.describe_left_out():
            lines.append(f"left out: {left_out}")
        return lines

    def _counts_of(self, file: int) -> FileCounts:
        files = self.counts.files
        if not files or files[-1].file != file:
            self._close_last_file()
            files.append(FileCounts(file))
        return files[-1]

    def _close_last_file(self) -> None:
        files = self.counts.files
        if files and files[-1].is_complete:
            files.pop()
        elif len(files) > LISTED_FILES:
            files.pop()
            self.counts.unlisted += 1


def _describe(counts: FileCounts | ReadCounts) -> str:
    return (
        f"{_number(counts.documents, 'document')}, {counts.empty:,} without text, "
        f"{counts.malformed:,} malformed"
    )


def _number(count: int, thing: str) -> str:
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"
