"""Typed JSON: exact types, and errors that name the file and the field."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from pydantic import ConfigDict

from fastllama import typed_json
from fastllama.typed_json import DamagedFileError, parse_json, read_json


@dataclass(frozen=True)
class Shard:
    __pydantic_config__ = ConfigDict(extra="forbid")

    file: str
    tokens: int


@dataclass(frozen=True)
class Manifest:
    version: int
    shards: tuple[Shard, ...]
    share: float = 0.0


WHOLE = '{"version": 1, "shards": [{"file": "a.npy", "tokens": 3}], "share": 1}'


def test_nested_dataclasses(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(WHOLE)
    manifest = read_json(path, Manifest)
    assert manifest == Manifest(1, (Shard("a.npy", 3),), 1.0)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"tokens": 3', '"tokens": "3"', r"shards\.0\.tokens: input should be a valid integer"),
        ('"tokens": 3', '"tokens": 3.5', r"shards\.0\.tokens: .*, not 3\.5"),
        ('"tokens": 3', '"tokens": true', r"shards\.0\.tokens: .*, not True"),
        ('"tokens": 3', '"token": 3', r"shards\.0\.tokens: field required"),
        ('"tokens": 3', '"tokens": 3, "x": 1', r"shards\.0\.x: unexpected keyword argument"),
        ('"tokens": 3', f'"tokens": 3, "{1000 * "x"}": 1', r"shards\.0\.x+\.\.\.: unexpected"),
        ('"version": 1', '"version": null', r"version: .*, not None"),
        ('"version": 1', '"version": NaN', r"version: .*, not nan"),
        ("]", "", "invalid JSON"),
        ('"a.npy"', '"' + 1000 * "a", "invalid JSON"),
        (WHOLE, 100_000 * "[", "invalid JSON|recursion"),
        (WHOLE, "", "invalid JSON"),
    ],
)
def test_damage_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(WHOLE.replace(old, new))
    with pytest.raises(DamagedFileError, match=f"(?i)^{path}: .*({message})") as damage:
        read_json(path, Manifest)
    assert len(str(damage.value)) < 300


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(WHOLE.encode().replace(b"a.npy", b"\xff\xfe"))
    with pytest.raises(DamagedFileError, match=r"manifest\.json: "):
        read_json(path, Manifest)


def test_size_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(typed_json, "MAX_BYTES", 10)
    path = tmp_path / "manifest.json"
    path.write_text(WHOLE)
    with pytest.raises(DamagedFileError, match="is larger than 10 bytes"):
        read_json(path, Manifest)


def test_lists_of_anything() -> None:
    assert parse_json('[{"a": 1}]', list[dict[str, int]], "x") == [{"a": 1}]
    with pytest.raises(DamagedFileError, match=r"x: 0\.a: "):
        parse_json('[{"a": "1"}]', list[dict[str, int]], "x")


def test_pipes_and_folders_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(DamagedFileError, match=f"^{path} is not a regular file$"):
            read_json(path, Manifest)
