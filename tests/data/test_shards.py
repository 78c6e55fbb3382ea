import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest

from fastllama.data.manifest import Shard
from fastllama.data.shards import SplitProgress, SplitWriter

UINT16 = np.dtype("uint16")
TOKENS = np.arange(25, dtype=UINT16)


def writer(folder: Path, progress: SplitProgress) -> SplitWriter:
    return SplitWriter(folder, "train", 10, progress, UINT16)


def test_shards_are_numpy_arrays(tmp_path: Path) -> None:
    progress = SplitProgress()
    shards = writer(tmp_path, progress)
    for piece in np.split(TOKENS, [3, 4, 21]):
        shards.append(piece)
    assert not any((tmp_path / "train-00002.npy").read_bytes()[:128])
    shards.complete_shard()
    found = [np.load(tmp_path / shard.file) for shard in shards.shards]
    assert [len(tokens) for tokens in found] == [10, 10, 5]
    assert np.array_equal(np.concatenate(found), TOKENS)
    sha256 = hashlib.sha256((tmp_path / "train-00001.npy").read_bytes()).hexdigest()
    assert shards.shards[1] == Shard("train-00001.npy", 10, sha256)


def test_full_disk_names_the_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = writer(tmp_path, SplitProgress())

    def open_full(path: Path) -> BinaryIO:
        return open("/dev/full", "r+b")

    monkeypatch.setattr("fastllama.data.shards.open_own", open_full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/train-00000.npy'"):
        shards.append(TOKENS[:5])
    with pytest.raises(OSError, match=r"No space left on device: '.*/train-00000.npy'"):
        shards.complete_shard()


def test_reports_each_shard_before_it_exists(tmp_path: Path) -> None:
    seen = []
    shards = SplitWriter(
        tmp_path,
        "train",
        10,
        SplitProgress(),
        UINT16,
        lambda: seen.append(len(os.listdir(tmp_path))),
    )
    shards.append(TOKENS)
    assert seen == [0, 1, 2]
    assert shards.progress.created == 3


def test_list_is_on_the_disk_before_it_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed = []

    def flush(path: Path) -> None:
        flushed.append(path.read_bytes())

    monkeypatch.setattr("fastllama.data.shard_list.fsync_file", flush)
    progress = SplitProgress()
    shards = writer(tmp_path, progress)
    for n_tokens in (9, 4, 20):
        shards.append(TOKENS[:n_tokens])
        shards.sync()
    # Nothing is complete at first.
    assert [lines.count(b"\n") for lines in flushed] == [1, 3]
    assert progress.list_sha256 == hashlib.sha256(flushed[-1]).hexdigest()
    assert flushed[-1] == (tmp_path / "train.sha256").read_bytes()


def test_resume_cuts_unrecorded_tokens(tmp_path: Path) -> None:
    progress = SplitProgress()
    shards = writer(tmp_path, progress)
    shards.append(TOKENS[:13])
    shards.sync()
    recorded = replace(progress)
    shards.append(TOKENS[:4])
    resumed = writer(tmp_path, recorded)
    resumed.append(TOKENS[13:])
    resumed.complete_shard()
    assert np.array_equal(
        np.concatenate([np.load(tmp_path / shard.file) for shard in resumed.shards]), TOKENS
    )


def test_changed_open_shard(tmp_path: Path) -> None:
    progress = SplitProgress()
    shards = writer(tmp_path, progress)
    shards.append(TOKENS[:3])
    shards.sync()
    path = tmp_path / "train-00000.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\7")
    with pytest.raises(ValueError, match=r"train-00000\.npy is damaged: found tokens of SHA-256"):
        writer(tmp_path, progress)
    path.unlink()
    with pytest.raises(ValueError, match=r"train-00000\.npy lacks tokens"):
        writer(tmp_path, progress)
    with pytest.raises(FileNotFoundError, match=r"train-00000\.npy"):
        shards.append(TOKENS[:1])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("target", ["nothing", "file"])
def test_never_writes_through_a_link(tmp_path: Path, target: str) -> None:
    outside = tmp_path / "outside"
    folder = tmp_path / "data"
    folder.mkdir()
    if target == "file":
        outside.write_text("mine")
    (folder / "train-00000.npy").symlink_to(outside)
    with pytest.raises(ValueError, match=r"train-00000\.npy is in the way"):
        writer(folder, SplitProgress()).append(TOKENS)
    (folder / "train-00000.npy").unlink()
    shards = writer(folder, SplitProgress())
    shards.append(TOKENS[:3])
    (folder / "train-00000.npy").unlink()
    (folder / "train-00000.npy").symlink_to(outside)
    for write in (lambda: shards.append(TOKENS[:3]), shards.complete_shard):
        with pytest.raises(ValueError, match=r"train-00000\.npy was replaced by a link"):
            write()
    assert outside.exists() == (target == "file")
    assert target == "nothing" or outside.read_text() == "mine"
