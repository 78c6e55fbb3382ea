"""What the readers of input files yield: the records of one file."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fastllama.printable import shortened

MAX_DOCUMENT_MB = 256
"""Default limit of a record, in MB (10^6 bytes). Reading takes up to five times as much memory."""
NAMED_FIELDS = 10


@dataclass(frozen=True, slots=True)
class NoText:
    """Why a record has no text, or the rest of a file no records."""

    reason: str
    fields: tuple[str, ...] | None = None  # that hold text, if the text field is missing
    records: int = 1
    malformed: bool = True
    ends_file: bool = False


class Record(NamedTuple):
    """A line, row or file: its number, from 1, and its text."""

    number: int
    content: str | NoText
    bytes_read: int  # of this file, before decompression


EMPTY = NoText("empty", malformed=False)
OTHER_ENCODING = "; convert another encoding, as with `iconv -f WINDOWS-1252 -t UTF-8`"


def too_long(max_bytes: int) -> NoText:
    """The reason of a record of more than `max_bytes`."""
    return NoText(f"longer than {max_bytes / 1e6:,.0f} MB: raise --max-document-mb, or split it")


def missing_field(field: str, fields: tuple[str, ...], texts: tuple[str, ...]) -> NoText:
    """The reason of a record without the text field, whose `fields` include `texts` with text."""
    return NoText(f"no field {field!r} among {list_fields(fields) or 'none'}", texts)


def list_fields(fields: Sequence[str]) -> str:
    """The names of the first `NAMED_FIELDS` fields, shortened, and the number of the others."""
    names = ", ".join(map(_shown, fields[:NAMED_FIELDS]))
    others = len(fields) - NAMED_FIELDS
    return f"{names} and {others:,} more" if others > 0 else names


def _shown(name: str) -> str:
    """A name as it is typed: in quotes, unless it is one word."""
    return shortened(name, 40) if re.fullmatch(r"[\w.-]+", name) else repr(shortened(name, 40))


def check_text(value: object, field: str) -> str | NoText:
    """`value` if it is a text that UTF-8 can encode, otherwise the reason."""
    if value is None:
        return NoText(f"field {field!r} is null")
    if not isinstance(value, str):
        return NoText(f"field {field!r} is of type {type(value).__name__}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # A byte of an array that is not UTF-8 was read as such a surrogate.
        may_be_byte = "\udc80" <= value[error.start] <= "\udcff"
        other = f", or is not UTF-8{OTHER_ENCODING}" if may_be_byte else ""
        return NoText(f"field {field!r} has a lone surrogate{other}")
    return value or EMPTY
