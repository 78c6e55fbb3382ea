import errno
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fastllama.data.token_file import TokenFile
from tests.data.folder import make_stream

# Several memory pages. A map would read zeros after the end of a truncated file in its last page.
TOKENS = np.arange(10_000, dtype=np.uint16)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "train-00000.npy"
    np.save(path, TOKENS)
    return path


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_reads_numpy_files(path: Path, dtype: str) -> None:
    np.save(path, TOKENS.astype(dtype))
    file = TokenFile(path)
    assert (file.dtype, file.shape) == (np.dtype(dtype), (10_000,))
    for first, n in ((0, 1), (0, 10_000), (9_999, 1), (137, 2048)):
        tokens = file.read(first, n)
        assert tokens.dtype == np.dtype(dtype)
        assert np.array_equal(tokens, TOKENS[first : first + n])


def test_reads_the_header_of_any_shape(path: Path) -> None:
    for shape in ((), (0,), (2, 5000), (10, 10, 100)):
        np.save(path, np.zeros(shape, np.int32))
        file = TokenFile(path)
        assert (file.dtype, file.shape) == (np.dtype(np.int32), shape)


def test_every_changed_bit_of_the_header_is_found(path: Path) -> None:
    data = path.read_bytes()
    assert data[127] == ord("\n")
    for bit in range(8 * 128):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(changed)
        try:
            file = TokenFile(path)
        except ValueError:
            continue
        assert (file.dtype, file.shape) != (np.dtype(np.uint16), (10_000,)), bit


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\x93NUMPY\x01\x00\xff\xff" + 70_000 * b"(",
        b"\x93NUMPY\x01\x00v\x00{'descr': '<z9', 'fortran_order': False, 'shape': (3,), }",
        b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (3,), }",
        b"\x93NUMPY\x01\x00v\x00{'descr': '<u2', 'fortran_order': False, 'shape': (-3,), }",
        b"\x93NUMPY\x01\x00v\x00{'descr': '<u2', 'fortran_order': False, 'shape': (3,), }x",
    ],
)
def test_rejects_other_headers(path: Path, header: bytes) -> None:
    path.write_bytes(header.ljust(127) + b"\n" + bytes(6))
    reason = (
        "not one of version 1 for numbers in C order" if header else "no header of a NumPy array"
    )
    with pytest.raises(ValueError, match=reason):
        TokenFile(path)


def test_rejects_unknown_dtype(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"<u2", b"<u3"))
    with pytest.raises(ValueError, match="unknown dtype <u3"):
        TokenFile(path)


def test_names_shard_truncated_while_open(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, TOKENS.tolist(), TOKENS.tolist())
    shard = tmp_path / "train-00001.npy"
    os.truncate(shard, 128 + 2 * 5000)
    assert stream.read(1, 5000).tolist() == [*range(5000, 10_000), 0]
    with pytest.raises(
        OSError, match=rf"^{shard} ends at byte 10128, .*; restore .* command again$"
    ):
        stream.read(2, 5000)


def test_names_shard_on_disk_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int, n: int, at: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    file = TokenFile(path)
    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(OSError, match=rf"Input/output error: '{path}'") as failure:
        file.read(0, 1)
    assert failure.value.errno == errno.EIO


def test_joins_partial_reads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pread = os.pread
    # Network file systems may return less than requested, even half a token.
    monkeypatch.setattr(os, "pread", lambda descriptor, n, at: pread(descriptor, min(n, 3), at))
    assert np.array_equal(TokenFile(path).read(7, 100), TOKENS[7:107])


def test_concurrent_reads_of_threads(path: Path) -> None:
    file, firsts = TokenFile(path), range(0, 9000, 9)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda first: file.read(first, 1000), firsts))
    for first, tokens in zip(firsts, found, strict=True):
        assert np.array_equal(tokens, TOKENS[first : first + 1000])


def test_reads_in_forked_process(path: Path) -> None:
    file = TokenFile(path)
    child = os.fork()
    if not child:
        os._exit(0 if np.array_equal(file.read(5, 3000), TOKENS[5:3005]) else 1)
    assert np.array_equal(file.read(5000, 5000), TOKENS[5000:])
    assert os.waitpid(child, 0)[1] == 0


def test_cannot_be_pickled(path: Path) -> None:
    with pytest.raises(TypeError, match="cannot pickle"):
        pickle.dumps(TokenFile(path))


def test_closes_with_last_reference(path: Path) -> None:
    def n_open() -> int:
        links = Path("/proc/self/fd").iterdir()
        return sum(os.path.lexists(link) and os.readlink(link) == str(path) for link in links)

    file = TokenFile(path)
    assert n_open() == 1
    del file
    assert n_open() == 0
