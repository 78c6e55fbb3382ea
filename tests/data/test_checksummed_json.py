import json
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from fastllama.data.checksummed_json import FORMAT_VERSION, read_checksummed, write_checksummed
from fastllama.typed_json import DamagedFileError


@dataclass(frozen=True)
class Record:
    n: int
    names: tuple[str, ...] = ("é", "b")
    share: float = 0.1
    format_version: int = FORMAT_VERSION


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_checksummed(tmp_path / "record.json", asdict(Record(5)))
    return tmp_path / "record.json"


def test_round_trip(path: Path) -> None:
    assert read_checksummed(path, Record) == Record(5)
    # The checksum is of the values, not of the formatting.
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))
    assert read_checksummed(path, Record) == Record(5)


def read_or_fail(path: Path) -> Record | str:
    try:
        return read_checksummed(path, Record)
    except ValueError as error:
        return str(error)


def test_every_changed_bit_is_found(path: Path) -> None:
    data = path.read_bytes()
    same = 0
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(changed)
        found = read_or_fail(path)
        assert found == Record(5) or str(found).startswith(f"{path}"), bit
        same += found == Record(5)
    # \u00e9 may be written \u00E9.
    assert same == 1


def test_version_1_needs_no_checksum(path: Path) -> None:
    path.write_text('{"n": 5, "format_version": 1}')
    assert read_checksummed(path, Record) == Record(5, format_version=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"n": 5}', "no format version"),
        ('{"n": 5, "format_version": "2"}', "no format version"),
        ('{"n": 5, "format_version": 0}', "no format version"),
        ('{"n": 5, "format_version": 2}', "differs from its checksum"),
        ('{"n": 5, "format_version": 2, "checksum": "0"}', "differs from its checksum"),
        ('{"n": "5", "format_version": 1}', "n: input should be a valid integer"),
        ("[]", "should be an object"),
    ],
)
def test_damage(path: Path, content: str, message: str) -> None:
    path.write_text(content)
    with pytest.raises(DamagedFileError, match=rf"record\.json: .*{message}"):
        read_checksummed(path, Record)


def test_newer_version(path: Path) -> None:
    write_checksummed(path, asdict(Record(5, format_version=FORMAT_VERSION + 1)))
    with pytest.raises(ValueError, match=r"record\.json has format version 3, .*upgrade"):
        read_checksummed(path, Record)
