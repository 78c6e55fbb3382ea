import bz2
import gzip
import lzma
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from fastllama.data import decompression
from fastllama.data.decompression import DAMAGE, decompressed
from fastllama.data.documents import Document, Malformed, read_documents


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": zstd,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def content_before_damage(path: Path) -> tuple[bytes, bool]:
    """Everything that can be read, and whether the end was reached without damage."""
    pieces = []
    try:
        with open(path, "rb") as raw:
            content = decompressed(raw, path.suffix)
            while piece := content.read1(1000):
                pieces.append(piece)
    except DAMAGE:
        return b"".join(pieces), False
    return b"".join(pieces), True


@pytest.mark.parametrize("suffix", PACK)
def test_round_trip(tmp_path: Path, suffix: str) -> None:
    data = os.urandom(300_000) + b"\n\0\0"
    path = tmp_path / f"x{suffix}"
    path.write_bytes(PACK[suffix](data) + PACK[suffix](b"second"))
    assert content_before_damage(path) == (data + b"second", True)


@pytest.mark.parametrize("suffix", PACK)
def test_every_cut_is_noticed(tmp_path: Path, suffix: str) -> None:
    text = os.urandom(100).hex().encode()
    packed = PACK[suffix](text)
    path = tmp_path / f"x{suffix}"
    for length in range(1, len(packed)):
        path.write_bytes(packed[:length])
        found, complete = content_before_damage(path)
        assert not complete
        assert text.startswith(found)


@pytest.mark.parametrize("suffix", [".zst", ".bz2", ".xz"])
@pytest.mark.timeout(60)
def test_bomb_is_not_expanded(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decompression, "EXPANSION_FROM", 2**22)
    path = tmp_path / f"x.jsonl{suffix}"
    data = PACK[suffix](b'{"text": "first"}\n{"text": "' + b"a" * 2**25)
    path.write_bytes(data)
    document, malformed = read_documents([path])
    assert isinstance(document, Document)
    assert isinstance(malformed, Malformed)
    assert "as in a decompression bomb" in malformed.reason


def test_text_that_expands_much_is_no_bomb(tmp_path: Path) -> None:
    path = tmp_path / "x.txt.zst"
    path.write_bytes(zstd(b"a" * 10**7))
    assert content_before_damage(path) == (b"a" * 10**7, True)


@pytest.mark.parametrize("suffix", ["", *PACK])
@pytest.mark.parametrize("name", ["x.jsonl", "x.txt", "x.json"])
def test_memory_for_an_endless_line(tmp_path: Path, suffix: str, name: str) -> None:
    path = tmp_path / f"{name}{suffix}"
    # 600 MB in a line: gzip, which is no bomb, needs about 0.6 MB for it.
    pieces = (b"[" if name == "x.json" else b'{"text": "' if name == "x.jsonl" else b"") + b"a"
    if suffix == ".gz":
        with gzip.open(path, "wb", compresslevel=1) as file:
            file.write(pieces)
            for _ in range(300):
                file.write(b"a" * 2_000_000)
    elif suffix == "":
        with open(path, "wb") as file:
            file.write(pieces)
            file.truncate(600_000_000)
    else:
        path.write_bytes(PACK[suffix](pieces + b"a" * 20_000_000) * 30)
    code = f"""
import resource
from pathlib import Path
from fastllama.data.documents import read_documents
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    records = list(read_documents([Path({str(path)!r})], max_document_mb=16))
except ValueError as error:
    print(str(error)[:50])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    reason, memory_mb = done.stdout.splitlines()
    assert reason.startswith("the input has no document")
    assert int(memory_mb) < 100
