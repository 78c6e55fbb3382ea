"""JSON files of a data folder, each with a format version and a checksum of its content."""

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

from fastllama.atomic import write_atomic
from fastllama.typed_json import DamagedFileError, parse_json, read_json

FORMAT_VERSION = 2
"""The version of most files. Files of version 1 carry no checksum."""

T = TypeVar("T")


def write_checksummed(path: Path, content: dict[str, Any]) -> None:
    """Write `content`, which has its `format_version`, atomically, and append its checksum."""
    checksummed = {**content, "checksum": _checksum(content)}
    write_atomic(path, json.dumps(checksummed, indent=2) + "\n")


def read_checksummed(path: Path, kind: type[T], newest: int = FORMAT_VERSION) -> T:
    """Read a file of `write_checksummed` as a dataclass `kind`, which has a `format_version`.

    A file of version 1 is read without a check.

    Raises:
        DamagedFileError: the content differs from its checksum or is not a `kind`.
        ValueError: a newer fastllama wrote the file, with a version above `newest`.
        OSError: the file cannot be read.
    """
    content = read_json(path, dict[str, Any])
    version = content.get("format_version")
    if type(version) is not int or version < 1:
        raise DamagedFileError(f"{path}: it has no format version")
    if version > newest:
        raise ValueError(
            f"{path} has format version {str(version)[:20]}, and this fastllama reads versions up "
            f"to {newest}: upgrade fastllama or prepare the data again"
        )
    if version > 1 and content.pop("checksum", None) != _checksum(content):
        raise DamagedFileError(f"{path}: its content differs from its checksum")
    return parse_json(json.dumps(content), kind, str(path))


def _checksum(content: dict[str, Any]) -> str:
    """SHA-256 (hex) of the values, independent of the file's formatting."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
