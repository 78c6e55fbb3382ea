import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastllama.data import stream as stream_module
from fastllama.data.prepare import prepare
from fastllama.data.stream import TokenStream
from tests.data.folder import make_folder, make_stream
from tests.workspace import Workspace

TOKENS = list(range(40, 63))


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("seq_len", [1, 4, 22])
@pytest.mark.parametrize("cuts", [(), (7,), (4, 8, 9), (5, 5, 20)], ids=str)
def test_sequences_cross_shards(
    tmp_path: Path, cuts: tuple[int, ...], seq_len: int, dtype: str
) -> None:
    bounds = [0, *cuts, len(TOKENS)]
    shards = [TOKENS[a:b] for a, b in itertools.pairwise(bounds)]
    stream = make_stream(tmp_path, *shards, dtype=dtype)
    assert stream.n_tokens == len(TOKENS)
    for index in range(stream.n_sequences(seq_len)):
        tokens = stream.read(index, seq_len)
        assert tokens.dtype == np.dtype(dtype)
        # The last token is also the first token of the next sequence.
        assert tokens.tolist() == TOKENS[index * seq_len : index * seq_len + seq_len + 1]


@pytest.mark.parametrize(
    ("seq_len", "n_sequences"), [(1, 22), (2, 11), (11, 2), (12, 1), (22, 1), (23, 0), (100, 0)]
)
def test_last_sequence_needs_its_last_target(
    tmp_path: Path, seq_len: int, n_sequences: int
) -> None:
    assert make_stream(tmp_path, TOKENS).n_sequences(seq_len) == n_sequences


def test_ids_beyond_16_bits(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, [1, 128_255, 70_000], dtype="uint32")
    assert stream.read(0, 2).tolist() == [1, 128_255, 70_000]


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_ids_outside_of_the_vocabulary(tmp_path: Path, dtype: str) -> None:
    manifest = make_folder(tmp_path, {"train": [range(40, 50), range(50, 60)]}, dtype)
    stream = TokenStream(tmp_path, replace(manifest, vocab_size=55), "train")
    assert stream.read(0, 14).tolist() == list(range(40, 55))
    with pytest.raises(
        ValueError,
        match=r"train-00001\.npy is damaged: found token id 55 at position 5, expected ids below",
    ):
        stream.read(0, 15)


@pytest.fixture
def one_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream has one shard open at a time."""
    monkeypatch.setattr(stream_module, "MAX_OPEN", 1)


def n_open(folder: Path) -> int:
    """Number of descriptors of this process for files in `folder`."""
    links = [link for link in Path("/proc/self/fd").iterdir() if os.path.lexists(link)]
    return sum(os.readlink(link).startswith(f"{folder}/") for link in links)


def test_few_shards_are_open(tmp_path: Path) -> None:
    shards = [range(4 * number, 4 * number + 4) for number in range(100)]
    stream = make_stream(tmp_path, *shards)
    for order in (range(100), [*range(0, 100, 7)] * 3):
        for index in order:
            # The sequences of the last shard would need another token.
            assert stream.read(index, 3).tolist() == list(range(3 * index, 3 * index + 4))
            assert n_open(tmp_path) <= stream_module.MAX_OPEN
    del stream
    assert n_open(tmp_path) == 0


@pytest.mark.usefixtures("one_open")
def test_threads_open_and_close_shards_of_each_other(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, *(range(4 * number, 4 * number + 4) for number in range(20)))
    indices = list(range(0, 80, 4)) * 50
    with ThreadPoolExecutor(8) as threads:
        found = threads.map(lambda index: stream.read(index, 1).tolist(), indices)
    assert list(found) == [[index, index + 1] for index in indices]


def replace_shard(path: Path, content: bytes) -> None:
    """Replace a shard, as a tool that renames does, by one that is a second newer."""
    time = path.stat().st_mtime_ns + 10**9
    aside = path.with_suffix(".new")
    aside.write_bytes(content)
    os.utime(aside, ns=(time, time))
    aside.rename(path)


@pytest.mark.usefixtures("one_open")
def test_shard_replaced_between_opens_is_named(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, range(40, 50), range(50, 60))
    shard = tmp_path / "train-00000.npy"
    content = shard.read_bytes()
    stream.read(0, 4)
    replace_shard(shard, content[:-1] + b"\1")
    # The open file still has the old tokens.
    assert stream.read(0, 4).tolist() == [40, 41, 42, 43, 44]
    with pytest.raises(ValueError, match=r"train-00000\.npy is damaged: found SHA-256 .*; restore"):
        reopen(stream)
    replace_shard(shard, content[:-2])
    with pytest.raises(ValueError, match=r"00000\.npy is damaged: found 146 bytes, expected 148"):
        reopen(stream)
    shard.unlink()
    with pytest.raises(ValueError, match=r"00000\.npy is damaged: found no such file"):
        reopen(stream)


def reopen(stream: TokenStream) -> list[int]:
    """The first tokens of shard 0, opened anew by a stream with one shard open at a time."""
    stream.read(3, 4)
    return stream.read(0, 4).tolist()


@pytest.mark.usefixtures("one_open")
def test_copy_of_a_shard_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = make_stream(tmp_path, range(40, 50), range(50, 60))
    shard = tmp_path / "train-00000.npy"
    replace_shard(shard, shard.read_bytes())
    for _ in range(2):
        assert reopen(stream) == [40, 41, 42, 43, 44]
        # The checksum is computed once.
        monkeypatch.delattr(stream_module, "sha256_of", raising=False)


def test_more_shards_than_descriptors(workspace: Workspace, tmp_path: Path) -> None:
    data = tmp_path / "data"
    prepare([str(workspace.corpus)], workspace.tokenizer, data, shard_tokens=60)
    assert len(list(data.glob("train-*.npy"))) > 300
    train = ["train", workspace.recipe, "--data.path", data, "--run-dir", tmp_path / "run"]
    for command in (["data", "check", data], train):
        words = [sys.executable, "-m", "fastllama", *map(str, command)]
        done = subprocess.run(
            ["sh", "-c", 'ulimit -n 256; exec "$@"', "sh", *words],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
