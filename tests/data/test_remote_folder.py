"""Data folders behind URLs: the tokens are those of the same folder on a disk."""

import gc
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastllama import urls
from fastllama.cli import main
from fastllama.data import block_cache
from fastllama.data.block_cache import BlockCache
from fastllama.data.dataset import open_folder
from fastllama.data.loader import BatchLoader
from fastllama.data.manifest import DataFolder, Manifest
from fastllama.data.remote_files import RemoteFile
from fastllama.data.stream import TokenStream
from fastllama.data.training_data import TrainingData
from tests.cli.refusal import refusal
from tests.data.folder import make_folder
from tests.object_store import ObjectStore, fail, object_store, upload
from tests.runs import losses, train
from tests.workspace import Workspace

URL = "store://bucket/data"
BLOCK = 64
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    monkeypatch.setattr(urls, "PAUSES_S", (0.0, 0.0))
    monkeypatch.setattr(block_cache, "BLOCK_BYTES", BLOCK)
    block_cache.block_cache.cache_clear()
    with object_store() as store:
        yield store


@pytest.fixture
def folder(tmp_path: Path, store: ObjectStore) -> Path:
    """Three shards of 300, 500 and 33 tokens, also at `URL`."""
    draw = np.random.default_rng(0)
    shards = [draw.integers(2, 260, n).tolist() for n in (300, 500, 32)]
    shards[-1].append(1)
    make_folder(tmp_path / "data", {"train": shards})
    upload(tmp_path / "data", URL)
    return tmp_path / "data"


def remote_stream(tmp_path: Path, cache_gb: float = 1.0) -> TokenStream:
    folder, manifest = open_folder(URL, str(tmp_path / "cache"), cache_gb)
    return TokenStream(folder, manifest, "train")


@pytest.mark.parametrize("cache_gb", [0.0, 1.0])
@pytest.mark.parametrize("seq_len", [1, 7, 32, 415])
def test_sequences_are_those_of_the_same_folder_on_a_disk(
    folder: Path, tmp_path: Path, seq_len: int, cache_gb: float
) -> None:
    local = TokenStream(folder, Manifest.load(folder), "train")
    remote = remote_stream(tmp_path, cache_gb)
    n = local.n_sequences(seq_len)
    assert remote.n_sequences(seq_len) == n
    for index in np.random.default_rng(1).permutation(n).tolist()[:40]:
        if index % 2:
            remote.fetch(index, seq_len)
        tokens = remote.read(index, seq_len)
        assert tokens.dtype == np.uint16
        assert tokens.tolist() == local.read(index, seq_len).tolist()


def test_batches_are_fetched_ahead_of_use(folder: Path, tmp_path: Path, store: ObjectStore) -> None:
    def batches(stream: TokenStream, n: int) -> list[list[int]]:
        data = TrainingData([stream], block_len=16, seed=3)
        with BatchLoader(data, seq_len=16, batch_size=2, device=CPU, depth=1) as loader:
            return [loader.next().inputs.flatten().tolist() for _ in range(n)]

    local = TokenStream(folder, Manifest.load(folder), "train")
    assert batches(remote_stream(tmp_path), 60) == batches(local, 60)
    shutil.rmtree(tmp_path / "cache")
    stream, paths = remote_stream(tmp_path), set[tuple[str, int]]()
    answer = ObjectStore.cat_file

    def record(self: ObjectStore, path: str, start: int, end: int, **options: Any) -> bytes:
        paths.add((path, start))
        return answer(self, path, start=start, end=end, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ObjectStore, "cat_file", record)
        batches(stream, 1)
        deadline = time.monotonic() + 30
        # 51 sequences are in all 833 tokens, which have 28 blocks.
        while len(paths) < 28 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert len(paths) == 28


def size_of(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())


@pytest.fixture
def file(store: ObjectStore) -> RemoteFile:
    """40 blocks and a half."""
    data = np.random.default_rng(0).bytes(40 * BLOCK + BLOCK // 2)
    store.pipe_file("/bucket/file", data)
    return RemoteFile.find("store://bucket/file")


def read_all(cache: BlockCache, file: RemoteFile) -> bytes:
    return b"".join(
        cache.read(file, first, min(50, file.size - first)) for first in range(0, file.size, 50)
    )


def test_the_cache_stays_below_its_bound(
    file: RemoteFile, store: ObjectStore, tmp_path: Path
) -> None:
    whole, bound = store.cat_file("/bucket/file"), 20 * (BLOCK + 4)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "notes.txt").write_text("mine")
    # Two processes share the folder.
    caches = [BlockCache(tmp_path / "cache", bound) for _ in range(2)]
    for number in range(0, file.size, 30):
        for cache in caches:
            assert cache.read(file, number, 20) == whole[number : number + 20]
            assert size_of(tmp_path / "cache") <= bound + len("mine")
    assert size_of(tmp_path / "cache") > bound // 2
    assert (tmp_path / "cache" / "notes.txt").exists()


def test_blocks_that_vanish_while_a_process_sweeps(
    file: RemoteFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_all(BlockCache(tmp_path, 10**6), file)
    (folder,) = tmp_path.iterdir()

    class Vanishing:
        """Deletes the first block between its listing and the look at it."""

        def fullmatch(self, name: str) -> bool:
            if len(list(folder.iterdir())) == 41:
                (tmp_path / name).unlink()
            return True

    monkeypatch.setattr(block_cache, "_BLOCK", Vanishing())
    BlockCache(tmp_path, 20 * (BLOCK + 4))._sweep()
    # An iterator that was left open would warn, which is an error here.
    gc.collect()
    # All others were counted: an eighth of the bound of 20 blocks is free.
    assert size_of(tmp_path) == 16 * (BLOCK + 4) + BLOCK // 2 + 4


def test_blocks_are_shared_checked_and_of_one_version(
    file: RemoteFile, store: ObjectStore, tmp_path: Path
) -> None:
    whole = store.cat_file("/bucket/file")
    assert read_all(BlockCache(tmp_path, 10**6), file) == whole
    other = BlockCache(tmp_path, 10**6)
    ObjectStore.on_request = fail(10**6, ConnectionResetError)
    assert read_all(other, file) == whole
    ObjectStore.on_request = None
    # As after a power cut.
    blocks = sorted(path for path in tmp_path.rglob("0*") if path.is_file())
    assert len(blocks) == 41
    blocks[3].write_bytes(b"")
    blocks[4].write_bytes(bytes(BLOCK + 4))
    blocks[5].write_bytes(blocks[6].read_bytes()[:-9])
    assert read_all(other, file) == whole
    assert len(blocks[4].read_bytes().rstrip(b"\0")) > BLOCK // 2
    # A file that was replaced has other blocks.
    store.pipe_file("/bucket/file", whole[::-1])
    assert read_all(other, RemoteFile.find("store://bucket/file")) == whole[::-1]


def test_a_full_disk_ends_nothing(
    file: RemoteFile,
    store: ObjectStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(block_cache, "write_shared", full)
    cache = BlockCache(tmp_path / "full", 10**6)
    assert read_all(cache, file) == store.cat_file("/bucket/file")
    assert capsys.readouterr().err == (
        f"{tmp_path}/full cannot keep blocks of the data (No space left on device); they are "
        "fetched for each use.\n"
    )


def test_failures_name_the_url(folder: Path, tmp_path: Path) -> None:
    stream = remote_stream(tmp_path)
    ObjectStore.on_request = fail(2, ConnectionResetError)
    assert len(stream.read(0, 16)) == 17
    ObjectStore.on_request = fail(10**6, lambda: ConnectionResetError(104, "Connection reset"))
    data = TrainingData([stream], block_len=16, seed=3)
    with BatchLoader(data, seq_len=16, batch_size=2, device=CPU) as loader:
        problem = rf"cannot read {URL}/train-.*: 3 tries failed.*check the network"
        with pytest.raises(OSError, match=problem):  # noqa: PT012  after blocks that are cached
            for _ in range(60):
                loader.next()
    # A later read tries again.
    ObjectStore.on_request = None
    assert len(stream.read(20, 16)) == 17


def test_training_and_commands(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    upload(workspace.data, URL)
    options = ["--data.cache-dir", tmp_path / "cache", "--training.training-tokens", 768]
    options += ["--optimizer.warmup-iterations", 1]
    train(workspace.recipe, "--run-dir", tmp_path / "remote", "--data.path", URL, *options)
    assert f"data    {URL}: " in capsys.readouterr().out
    train(workspace.recipe, "--run-dir", tmp_path / "local", *options)
    assert losses(tmp_path / "remote") == losses(tmp_path / "local") != {}
    # The data is the same, so either run goes on with the other's.
    train("--resume", tmp_path / "local", "--data.path", URL)
    capsys.readouterr()
    main(["data", "check", URL])
    assert capsys.readouterr().out.startswith(
        f"{URL}: 20,279 tokens, every shard matches its check"
    )
    main(["data", "stats", URL])
    remote = capsys.readouterr().out
    main(["data", "stats", str(workspace.data)])
    assert remote == capsys.readouterr().out.replace(str(workspace.data), URL)


def check(folder: DataFolder, manifest: Manifest) -> None:
    manifest.check_contents(folder)


def drop(store: ObjectStore, name: str) -> None:
    store.rm_file(f"/bucket/data/{name}")


def shorten(store: ObjectStore, name: str) -> None:
    store.pipe_file(f"/bucket/data/{name}", store.store[f"/bucket/data/{name}"].getvalue()[:-2])


def flip(store: ObjectStore, name: str) -> None:
    data = bytearray(store.store[f"/bucket/data/{name}"].getvalue())
    data[-1] ^= 1
    store.pipe_file(f"/bucket/data/{name}", bytes(data))


def add(store: ObjectStore, name: str) -> None:
    store.pipe_file(f"/bucket/data/{name}", b"")


@pytest.mark.parametrize(
    ("change", "name", "problem"),
    [
        (drop, "manifest.json", f"{URL} has no manifest.json: copy a whole folder there"),
        (drop, "tokenizer.json", f"{URL} has no tokenizer.json: copy a whole folder there"),
        (flip, "manifest.json", f"{URL}/manifest.json"),
        (drop, "train-00001.npy", f"{URL}/train-00001.npy is damaged: found no such file"),
        (shorten, "train-00001.npy", "train-00001.npy is damaged: found 1126 bytes, expected 1128"),
        (flip, "train-00001.npy", f"{URL}/train-00001.npy is damaged: found SHA-256"),
        (add, "train-00007.npy", f"{URL}/train-00007.npy is not listed in manifest.json"),
    ],
)
def test_data_check_finds_damage(
    folder: Path,
    store: ObjectStore,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    change: Any,
    name: str,
    problem: str,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    change(store, name)
    with pytest.raises(ValueError, match=re.escape(problem)) as caught:
        check(*open_folder(URL))
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("store://bucket/nothing", "store://bucket/nothing has no manifest.json: copy a whole"),
        ("foo://bucket/data", "fsspec knows no scheme foo://"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], url: str, problem: str) -> None:
    assert problem in refusal(capsys, "data", "check", url)
