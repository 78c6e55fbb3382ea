"""Reads the project's JSON files into typed values. Every error names the file and the field."""

from collections.abc import Hashable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

T = TypeVar("T")

MAX_BYTES = 2**28
"""Size above which a file is not read: none of ours comes near it."""


class DamagedFileError(ValueError):
    """A file does not hold what the project writes into it."""


def read_json(path: Path, kind: type[T]) -> T:
    """Read `path` as a value of `kind`: a dataclass, or a list, tuple or dict of typed values.

    Types must match exactly: "1" and 1.5 are no integers, and true is none either. A dataclass with
    `__pydantic_config__ = ConfigDict(extra="forbid")` rejects unknown fields.

    Raises:
        DamagedFileError: the path is not a regular file, or the file is too large, not JSON, or has
            a field of another type; the message names the file and the field.
        OSError: the file cannot be read.
    """
    return parse_json(read_regular(path), kind, str(path))


def read_regular(path: Path) -> bytes:
    """The content of a regular file.

    Raises:
        DamagedFileError: the path is not a regular file, or it is larger than `MAX_BYTES`.
        OSError: the file cannot be read.
    """
    # A pipe would wait for a writer.
    if path.exists() and not path.is_file():
        raise DamagedFileError(f"{path} is not a regular file")
    with open(path, "rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise DamagedFileError(f"{path} is larger than {MAX_BYTES} bytes")
    return content


def parse_json(content: bytes | str, kind: type[T], source: str) -> T:
    """Parse JSON as a value of `kind`; `source` names it in errors.

    Raises:
        DamagedFileError: as for `read_json`.
    """
    # Not above: every command imports this module, and few read such a file.
    from pydantic import ValidationError

    try:
        value: T = _adapter(cast(Hashable, kind)).validate_json(content, strict=True)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        raise DamagedFileError(f"{source}: {_in_words(problem)}") from None
    return value


@cache
def _adapter(kind: Hashable) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(cast(Any, kind))


def _in_words(problem: Mapping[str, Any]) -> str:
    """One clause about a problem that pydantic found: 60 characters of the field and the value."""
    field = _shortened(".".join(map(str, problem["loc"])))
    message = problem["msg"][:1].lower() + problem["msg"][1:]
    if problem["type"] == "json_invalid":
        return message
    found = "" if problem["type"] == "missing" else f", not {_shortened(repr(problem['input']))}"
    return f"{field}: {message}{found}" if field else f"{message}{found}"


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
