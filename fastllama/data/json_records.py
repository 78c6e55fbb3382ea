"""Reads records from JSON Lines, and from JSON arrays and objects."""

import codecs
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import IO

import pyarrow as pa
import pyarrow.json

from fastllama.data.decompression import BUFFER_BYTES, DamagedInputError
from fastllama.data.records import (
    EMPTY,
    OTHER_ENCODING,
    NoText,
    Record,
    check_text,
    missing_field,
    too_long,
)

LONG_RECORD_BYTES = 2**23
"""Parsed as Python objects, JSON may take 30 times its size. Arrow parses a longer line, and builds
only the text."""

_ARRAY_REMEDY = "; end the name of a file that is one array in .json"
_ONE_LINE_REMEDY = "; a value must fill one line: end the name in .json, or use `jq -c .`"
_MANY_VALUES_REMEDY = "; a line must hold one value: use `jq -c .`"
_COMMA_REMEDY = "; remove the comma after each value, as with `sed 's/,[[:space:]]*$//'`"
_SEPARATORS = re.compile(r"[\s,]*")
_OPENING = ("{", "[", '"')
_MARKS = re.compile(r'\\.|["{}\[\]]', re.DOTALL)
# Python refuses integers of more than 4,300 digits, but no float.
_ANY_NUMBER = json.JSONDecoder(parse_int=float)


def read_json_lines(
    raw: IO[bytes], content: IO[bytes], field: str, skip: int, max_bytes: int
) -> Iterator[Record]:
    """Yield the records of the lines after the first `skip`. Blank lines are left out."""
    number = 0
    while line := content.readline(max_bytes + 1):
        number += 1
        if len(line) > max_bytes:
            _skip_line(content, line)
            text: str | NoText = too_long(max_bytes)
        elif number <= skip or line.isspace():
            continue
        else:
            text = _parse_line(line, field)
        if number > skip:
            yield Record(number, text, raw.tell())


def read_json(
    raw: IO[bytes], content: io.BufferedReader, field: str, skip: int, max_bytes: int
) -> Iterator[Record]:
    """Yield the records of a JSON file after the first `skip`.

    The file is an array of records, one object, or JSON Lines. A single object without the text
    field is no document: it describes a dataset, a model or a tool.
    """
    first = content.peek(BUFFER_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()
    if first.startswith(b"[") or _begins_indented_object(first):
        values = _read_values(raw, content, field, max_bytes)
        records: Iterator[Record] = (record for record in values if record.number > skip)
    else:
        records = read_json_lines(raw, content, field, skip, max_bytes)
    yield from records if skip else _pass_over_metadata(records)


def _pass_over_metadata(records: Iterator[Record]) -> Iterator[Record]:
    """Make a record without the text field no malformed one if the file has no other record."""
    first = next(records, None)
    if first is None:
        return
    if isinstance(first.content, NoText) and first.content.fields is not None:
        second = next(records, None)
        if second is None:
            yield first._replace(content=replace(first.content, malformed=False))
            return
        yield first
        first = second
    yield first
    yield from records


def _begins_indented_object(text: bytes) -> bool:
    """Whether the first line is `{` or another beginning of an object that goes on."""
    line, newline, _ = text.partition(b"\n")
    content = line.decode(errors="replace").rstrip()
    try:
        json.loads(content)
    except json.JSONDecodeError as error:
        return bool(newline) and content.startswith("{") and error.pos >= len(content)
    except (ValueError, RecursionError):
        return False
    return False


def _skip_line(content: IO[bytes], line: bytes) -> None:
    while line and not line.endswith(b"\n"):
        line = content.readline(BUFFER_BYTES)


def _parse_line(line: bytes, field: str) -> str | NoText:
    if len(line) > LONG_RECORD_BYTES:
        return _parse_long_line(line, field)
    try:
        record = _loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return NoText(f"not UTF-8 at byte {error.start}{OTHER_ENCODING}")
    except RecursionError:
        return NoText("not JSON (nested too deeply)")
    except ValueError as error:
        return NoText(f"not JSON ({error}){_remedy(line, error)}")
    if isinstance(record, list):
        return NoText(f"an array, not a JSON object{_ARRAY_REMEDY}")
    return _text_of(record, field)


def _loads(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:
        return _ANY_NUMBER.decode(text)


def _remedy(line: bytes, error: ValueError) -> str:
    """The rest of the sentence about a line that is not JSON: what it most likely is."""
    if line[:1] == b"[":
        return _ARRAY_REMEDY
    if not isinstance(error, json.JSONDecodeError):
        return ""
    if error.msg == "Extra data":
        is_comma = error.doc[error.pos :].strip() == ","
        return _COMMA_REMEDY if is_comma else _MANY_VALUES_REMEDY
    is_unfinished = line[:1] == b"{" and error.pos >= len(error.doc.rstrip())
    return _ONE_LINE_REMEDY if is_unfinished else ""


def _text_of(record: object, field: str) -> str | NoText:
    if not isinstance(record, dict):
        example = json.dumps({field: "…"}, ensure_ascii=False)
        return NoText(f"not a JSON object; write a text as {example}")
    if field not in record:
        texts = (name for name, value in record.items() if value and isinstance(value, str))
        return missing_field(field, tuple(record), tuple(texts))
    return check_text(record[field], field)


def _parse_long_line(line: bytes, field: str) -> str | NoText:
    if len(line) >= 2**31 - 1:  # Arrow counts the bytes of a block in 32 bits.
        return NoText("longer than 2 GB: split it")
    try:
        line.decode()
        table = pyarrow.json.read_json(
            pa.BufferReader(line),
            pyarrow.json.ReadOptions(use_threads=False, block_size=len(line) + 1),
            pyarrow.json.ParseOptions(
                explicit_schema=pa.schema([(field, pa.large_string())]),
                unexpected_field_behavior="ignore",
            ),
        )
    except UnicodeDecodeError as error:
        return NoText(f"not UTF-8 at byte {error.start}")
    except pa.ArrowInvalid as error:
        return NoText(f"no JSON object with a string {field!r} ({error})")
    if table.num_rows != 1:
        return NoText(f"{table.num_rows} JSON objects in a line")
    text = table.column(0)[0].as_py()
    return NoText(f"field {field!r} is missing or null") if text is None else text or EMPTY


def _read_values(
    raw: IO[bytes], content: io.BufferedReader, field: str, max_bytes: int
) -> Iterator[Record]:
    """Yield the records of an array, or of objects one after another.

    Each value is parsed where it begins; if it is incomplete, again with more of the file.
    """
    decoder = json.JSONDecoder()
    # Invalid UTF-8 becomes surrogates, which spoil only the text that holds them.
    utf8 = codecs.getincrementaldecoder("utf-8-sig")(errors="surrogateescape")
    text, at, number, in_array, at_end = "", 0, 0, False, False

    def read(n_bytes: int = BUFFER_BYTES) -> str:
        nonlocal at_end
        part = ""
        # A character may be cut.
        while not part and not at_end:
            data = content.read1(n_bytes)
            at_end = not data
            part = utf8.decode(data, final=at_end)
        return part

    while True:
        at = next(_SEPARATORS.finditer(text, at)).end()
        if text[at : at + 1] == ("]" if in_array else "[") and (in_array or not number):
            in_array, at = not in_array, at + 1
            continue
        is_long, problem = len(text) - at > LONG_RECORD_BYTES, ""
        try:
            try:
                value, end = decoder.raw_decode(text, at)
            except ValueError as error:
                if isinstance(error, json.JSONDecodeError):
                    raise
                value, end = _ANY_NUMBER.raw_decode(text, at)
        except RecursionError:
            problem = "nested too deeply"
        except ValueError as error:
            if at_end and at == len(text) and not in_array:
                return
            if at_end or is_long:
                problem = f"not JSON ({getattr(error, 'msg', error)})"
        else:
            # A number at the end of `text` may go on.
            if at_end or end < len(text):
                number += 1
                too_large = end - at > max_bytes
                record = too_long(max_bytes) if too_large else _text_of(value, field)
                yield Record(number, record, raw.tell())
                at = end
                continue
        if not (problem or is_long):
            text, at = text[at:] + read(max(BUFFER_BYTES, len(text) - at)), 0
            continue
        after = _pass_over(text, at, lambda: "")
        if after is None:
            if is_long:
                problem = "longer than 8 MB: write JSON Lines, with one record a line"
            after = _pass_over(text, at, read)
        if after is None:
            raise DamagedInputError(f"a record is {problem}")
        number += 1
        yield Record(number, NoText(problem), raw.tell())
        text, at = after


def _pass_over(text: str, at: int, read: Callable[[], str]) -> tuple[str, int] | None:
    """Find the end of the value that begins at `at`, without parsing it.

    Returns:
        A text, and the place in it behind the value. None if the value has no end, or is no
        object, array or string. `read` gives the next part of the file, and "" at its end.
    """
    if not text.startswith(_OPENING, at):
        return None
    depth, in_string = 0, False
    while True:
        for match in _MARKS.finditer(text, at):
            mark, at = match[0], match.end()
            if mark == '"':
                in_string = not in_string
            elif not in_string and len(mark) == 1:
                depth += 1 if mark in _OPENING else -1
            if not depth and not in_string:
                return text, at
        # An escape may be cut.
        cut = "\\" if text.endswith("\\") and at < len(text) else ""
        part = read()
        if not part:
            return None
        text, at = cut + part, 0
