"""Random damage to a file: to its bytes, to its values, or to what the path is."""

import gzip
import json
import os
import random
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tomli_w

VALUES: list[Any] = [
    *(None, True, -1, 0, 1, 2**31, 10**30, 1.5, 1e300, float("nan"), "", "x", "é" * 400),
    *("../x", "/x", "a\0b", "\ud800", "\x1b[2J", "$a_b^{c", "{0}%s[red]", [], {}, [[1]], {"a": 1}),
]
INSERTED = [
    *(b"\0", b"\xff", b"-", b"\n", b",", b'"', b"\x1b]0;x\x07", b"\xef\xbb\xbf", b"\r\n"),
    *(b"[" * 100_000, b"9" * 5000, b" " * 100_000, b"A" * 100_000),
]

Mutation = Callable[[bytes, random.Random], bytes]


def flip_a_bit(data: bytes, draw: random.Random) -> bytes:
    # Headers are short, so half of the flips are near the start.
    end = len(data) if draw.random() < 0.5 else min(130, len(data))
    at = draw.randrange(end)
    return data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]


def cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def insert(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data) + 1)
    return data[:at] + draw.choice(INSERTED) + data[at:]


def overwrite(data: bytes, draw: random.Random) -> bytes:
    at, length = draw.randrange(len(data)), draw.choice([1, 4, 8, 512])
    return data[:at] + draw.choice([bytes(length), b"\xff" * length]) + data[at + length :]


def repeat_a_part(data: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(data))
    part = data[start : start + draw.choice([1, 16, 4096])]
    return data[:start] + part * draw.choice([2, 3, 100]) + data[start + len(part) :]


def move_the_end(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data))
    return data[at:] + data[:at]


def replace_a_value(content: Any, draw: random.Random) -> None:
    """Replace, remove or rename a random value of parsed JSON or TOML, in place."""
    places: list[tuple[Any, Any]] = []
    pending = [content]
    while pending:
        parent = pending.pop()
        keys = list(parent) if isinstance(parent, dict) else range(len(parent))
        places += [(parent, key) for key in keys]
        pending += [parent[key] for key in keys if isinstance(parent[key], (dict, list))]
    parent, key = draw.choice(places)
    kind = draw.random()
    if kind < 0.15:
        del parent[key]
    elif kind < 0.25 and isinstance(parent, dict):
        parent[draw.choice([f"{key} ", "../x", "\x1b[2J", "é" * 400])] = parent.pop(key)
    else:
        parent[key] = draw.choice(VALUES)


def replace_in_json(data: bytes, draw: random.Random) -> bytes:
    content = json.loads(data)
    replace_a_value(content, draw)
    return json.dumps(content).encode()


def replace_in_a_line(data: bytes, draw: random.Random) -> bytes:
    lines = data.splitlines(keepends=True)
    number = draw.randrange(len(lines))
    lines[number] = replace_in_json(lines[number], draw) + b"\n"
    return b"".join(lines)


def replace_in_toml(data: bytes, draw: random.Random) -> bytes:
    content = tomllib.loads(data.decode())
    replace_a_value(content, draw)
    try:
        return tomli_w.dumps(content).encode("utf-8", "surrogatepass")
    except TypeError:  # TOML has no null.
        return flip_a_bit(data, draw)


def replace_a_cell(data: bytes, draw: random.Random) -> bytes:
    lines = data.split(b"\n")
    number = draw.randrange(len(lines))
    cells = lines[number].split(b",")
    cells[draw.randrange(len(cells))] = str(draw.choice(VALUES)).encode("utf-8", "surrogatepass")
    lines[number] = b",".join(cells)
    return b"\n".join(lines)


def compress_again(data: bytes, draw: random.Random) -> bytes:
    return gzip.compress(data, mtime=0)


BYTES: list[Mutation] = [
    *(flip_a_bit, flip_a_bit, flip_a_bit, cut, cut, insert, overwrite, repeat_a_part, move_the_end),
    compress_again,
]
BY_SUFFIX: dict[str, list[Mutation]] = {
    ".json": [replace_in_json] * 8,
    ".jsonl": [replace_in_a_line] * 8,
    ".toml": [replace_in_toml] * 8,
    ".csv": [replace_a_cell] * 8,
}


def remove(path: Path, outside: Path, draw: random.Random) -> None:
    path.unlink()


def make_empty(path: Path, outside: Path, draw: random.Random) -> None:
    path.write_bytes(b"")


def make_a_folder(path: Path, outside: Path, draw: random.Random) -> None:
    path.unlink()
    path.mkdir()
    if draw.random() < 0.5:
        (path / "file").write_text("of somebody else")


def make_a_pipe(path: Path, outside: Path, draw: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def link_outside(path: Path, outside: Path, draw: random.Random) -> None:
    path.unlink()
    path.symlink_to(draw.choice(sorted(outside.iterdir())))


def link_in_a_circle(path: Path, outside: Path, draw: random.Random) -> None:
    path.unlink()
    path.symlink_to(draw.choice([path.name, ".", ".."]))


def link_to_zeros(path: Path, outside: Path, draw: random.Random) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def swap(path: Path, outside: Path, draw: random.Random) -> None:
    other = draw.choice(sorted(file for file in path.parent.iterdir() if file.is_file()))
    content = path.read_bytes()
    shutil.copyfile(other, path) if other != path else path.write_bytes(content[::-1])


PATHS = [
    *(remove, make_empty, make_a_folder, make_a_pipe, link_outside, link_in_a_circle),
    *(link_to_zeros, swap),
]


def damage(path: Path, outside: Path, draw: random.Random) -> str:
    """Damage the file `path`; return the name of the kind of damage.

    A link made by the damage may lead to a file of the folder `outside`.
    """
    if draw.random() < 0.15:
        change = draw.choice(PATHS)
        change(path, outside, draw)
        return change.__name__
    return damage_bytes(path, draw)


def damage_bytes(path: Path, draw: random.Random) -> str:
    """Damage the content of the file `path`; return the name of the kind of damage."""
    kinds = BYTES + BY_SUFFIX.get(path.suffix, [])
    kind = draw.choice(kinds if path.stat().st_size else [insert])
    path.write_bytes(kind(path.read_bytes(), draw))
    return kind.__name__
