"""Which files prepare touches, and what it finds before it resumes."""

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fastllama.data.accounting import FileCounts
from fastllama.data.manifest import Manifest
from fastllama.data.prepare_state import (
    PrepareProgress,
    delete_unused_shards,
    record_next_shard,
)
from fastllama.data.shard_list import list_path, shard_name
from fastllama.data.tokenizer import save_tokenizer, train_tokenizer
from fastllama.typed_json import DamagedFileError
from tests.data.interrupted import Preparation, contents, make_preparation


@pytest.fixture
def preparation(tmp_path: Path) -> Preparation:
    return make_preparation(tmp_path)


@pytest.fixture
def interrupted(preparation: Preparation) -> Preparation:
    """Finished shards, an open one, and shards that are not recorded."""
    preparation.interrupt()
    return preparation


def open_shard(output: Path) -> Path:
    progress = PrepareProgress.load(output)
    return next(
        output / shard_name(name, split.complete)
        for name, split in progress.splits.items()
        if split.open_tokens
    )


def finished_shard(output: Path) -> Path:
    progress = PrepareProgress.load(output)
    return output / next(
        shard_name(name, 0) for name, split in progress.splits.items() if split.complete
    )


def flip_bit(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def without_lock(folder: Path) -> dict[str, bytes | str]:
    return {name: data for name, data in contents(folder).items() if name != ".lock"}


def test_interrupted_folder_resumes(interrupted: Preparation, tmp_path: Path) -> None:
    before = without_lock(interrupted.output)
    assert "progress.json" in before
    assert finished_shard(interrupted.output).exists()
    assert open_shard(interrupted.output).exists()
    interrupted.run()
    interrupted.run(tmp_path / "reference")
    assert without_lock(interrupted.output) == without_lock(tmp_path / "reference")


def test_folder_of_another_program_is_left_alone(preparation: Preparation) -> None:
    output = preparation.output
    output.mkdir()
    (output / "job.json").write_text('{"name": "my cluster job"}')
    (output / "train-00000.npy").write_text("mine")
    before = contents(output)
    with pytest.raises(
        ValueError, match=r"job\.json: .* did not write it: restore it, or choose another"
    ):
        preparation.run()
    assert contents(output) == before


@pytest.mark.parametrize("content", ["[]", '{"inputs": [', "", "{}", "\x00"])
def test_damaged_job(interrupted: Preparation, content: str) -> None:
    (interrupted.output / "job.json").write_text(content)
    before = contents(interrupted.output)
    with pytest.raises(DamagedFileError, match=r"job\.json: "):
        interrupted.run()
    assert contents(interrupted.output) == before


@pytest.mark.parametrize("name", ["job.json", "progress.json"])
def test_state_that_is_no_file(interrupted: Preparation, name: str) -> None:
    (interrupted.output / name).unlink()
    os.mkfifo(interrupted.output / name)
    with pytest.raises(ValueError, match=rf"{name} is not a file"):
        interrupted.run()


@pytest.mark.parametrize(
    "content",
    [
        '{"position": [0, 250], "skipped": 0}',
        '{"position": [0, 25',
        "[]",
        '{"format_version": 1, "position": [0, 0], "skipped": 0, "splits": {}}',
    ],
)
def test_damaged_progress(interrupted: Preparation, content: str) -> None:
    (interrupted.output / "progress.json").write_text(content)
    before = contents(interrupted.output)
    with pytest.raises(DamagedFileError, match=r"progress\.json: .*damaged, or another version"):
        interrupted.run()
    assert contents(interrupted.output) == before


def test_split_outside_of_the_folder(interrupted: Preparation, tmp_path: Path) -> None:
    output = interrupted.output
    open_shard(output).rename(tmp_path / "outside-00000.npy")
    progress = PrepareProgress.load(output)
    progress.splits = {"../outside": progress.splits["train"]}  # type: ignore[dict-item]
    progress.save(output)
    before = contents(tmp_path)
    with pytest.raises(DamagedFileError, match=r"progress\.json: splits\.\.\./outside"):
        interrupted.run()
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda progress: progress.splits.pop("train"),
        lambda progress: setattr(progress.splits["train"], "complete", 1),
        lambda progress: setattr(progress.splits["train"], "complete", 10**15),
        lambda progress: setattr(progress.splits["train"], "tokens", 1),
        lambda progress: setattr(progress.splits["train"], "created", 0),
        lambda progress: setattr(progress, "position", (-1, 0)),
        lambda progress: setattr(progress, "position", (2, 0)),
        lambda progress: setattr(progress.splits["train"], "open_tokens", 10**30),
        lambda progress: progress.read.files.append(FileCounts(1)),
        lambda progress: progress.read.files.append(FileCounts(-1)),
    ],
)
def test_forged_progress(interrupted: Preparation, change: object) -> None:
    progress = PrepareProgress.load(interrupted.output)
    change(progress)  # type: ignore[operator]
    progress.save(interrupted.output)
    before = contents(interrupted.output)
    with pytest.raises(ValueError, match=r"progress\.json|lacks tokens"):
        interrupted.run()
    assert contents(interrupted.output) == before


def test_huge_count_of_created_shards(interrupted: Preparation) -> None:
    progress = PrepareProgress.load(interrupted.output)
    progress.splits["train"].created = 10**15
    progress.save(interrupted.output)
    interrupted.run()
    Manifest.load(interrupted.output).check_contents(interrupted.output)


def test_file_in_the_way_of_a_shard(preparation: Preparation) -> None:
    preparation.output.mkdir()
    preparation.interrupt(commits=1)
    progress = PrepareProgress.load(preparation.output)
    # Another program's file, under the name of a shard that was never created.
    mine = preparation.output / shard_name("train", progress.splits["train"].created)
    mine.write_text("mine")
    with pytest.raises(ValueError, match=rf"{mine.name} is in the way"):
        preparation.run()
    assert mine.read_text() == "mine"
    mine.unlink()
    preparation.run()


@pytest.mark.parametrize("at", [130, -1])
def test_changed_finished_shard(interrupted: Preparation, at: int) -> None:
    shard = finished_shard(interrupted.output)
    flip_bit(shard, at)
    before = contents(interrupted.output)
    with pytest.raises(DamagedFileError, match=rf"{shard.name} is damaged: found SHA-256"):
        interrupted.run()
    assert contents(interrupted.output) == before
    shard.unlink()
    with pytest.raises(DamagedFileError, match=rf"{shard.name} is damaged: .*no such file"):
        interrupted.run()


def test_changed_open_shard(interrupted: Preparation) -> None:
    shard = open_shard(interrupted.output)
    flip_bit(shard, 128)
    with pytest.raises(DamagedFileError, match=rf"{shard.name} is damaged: found tokens of"):
        interrupted.run()
    flip_bit(shard, 128)
    os.truncate(shard, 129)
    with pytest.raises(ValueError, match=rf"{shard.name} lacks tokens"):
        interrupted.run()


def test_list_of_complete_shards(interrupted: Preparation) -> None:
    command = ["sha256sum", "--check", "--strict", "train.sha256"]
    done = subprocess.run(command, cwd=interrupted.output, capture_output=True, check=True)
    complete = PrepareProgress.load(interrupted.output).splits["train"].complete
    assert done.stdout.count(b": OK\n") == complete > 1


def test_recording_takes_no_longer_with_more_shards(preparation: Preparation) -> None:
    preparation.interrupt(commits=2)
    few = (preparation.output / "progress.json").stat().st_size
    # What it writes before each shard does not read the list.
    os.truncate(preparation.output / "train.sha256", 0)
    record_next_shard(preparation.output, "train")
    shutil.rmtree(preparation.output)
    preparation.interrupt(commits=5)
    assert PrepareProgress.load(preparation.output).splits["train"].complete > 5
    # More digits, and the checksum of the second list; no shards.
    assert (preparation.output / "progress.json").stat().st_size < few + 100


@pytest.mark.parametrize(
    "lines", [b"torn", bytes(80) + b"\n", b"0" * 64 + b"  mine.npy\n", b"x" * 5000]
)
def test_unrecorded_lines_of_the_list_are_overwritten(
    interrupted: Preparation, tmp_path: Path, lines: bytes
) -> None:
    with open(interrupted.output / "train.sha256", "ab") as file:
        file.write(lines)
    interrupted.interrupt(commits=1)
    written = (interrupted.output / "train.sha256").read_bytes()
    complete = PrepareProgress.load(interrupted.output).splits["train"].complete
    assert written.count(b"\n") == written.count(b".npy\n") == complete
    assert written.endswith(b".npy\n")
    interrupted.run()
    interrupted.run(tmp_path / "reference")
    assert without_lock(interrupted.output) == without_lock(tmp_path / "reference")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda path: path.unlink(), "found no such file"),
        (lambda path: flip_bit(path, 0), "found SHA-256 .* of its lines"),
        (lambda path: os.truncate(path, 40), "found SHA-256 .* of its lines"),
    ],
)
def test_changed_list(
    interrupted: Preparation, change: Callable[[Path], object], found: str
) -> None:
    change(interrupted.output / "train.sha256")
    before = contents(interrupted.output)
    with pytest.raises(DamagedFileError, match=rf"train\.sha256 is damaged: {found}"):
        interrupted.run()
    assert contents(interrupted.output) == before


def test_forged_list(interrupted: Preparation) -> None:
    path = interrupted.output / "train.sha256"
    path.write_bytes(path.read_bytes().replace(b"train-00000", b"train-00007", 1))
    progress = PrepareProgress.load(interrupted.output)
    split = progress.splits["train"]
    lines = path.read_bytes().splitlines(keepends=True)[: split.complete]
    split.list_sha256 = hashlib.sha256(b"".join(lines)).hexdigest()
    progress.save(interrupted.output)
    with pytest.raises(DamagedFileError, match=r"train\.sha256: line 1 is not that of train-00000"):
        interrupted.run()


def test_list_of_another_program_is_left_alone(preparation: Preparation) -> None:
    preparation.output.mkdir()
    preparation.interrupt(commits=0)
    # The shards of this job are not recorded, and its list was never written.
    delete_unused_shards(preparation.output, PrepareProgress.load(preparation.output))
    mine = list_path(preparation.output, "train")
    mine.write_text("mine")
    with pytest.raises(ValueError, match=r"train\.sha256 is in the way"):
        preparation.run()
    assert mine.read_text() == "mine"
    mine.unlink()
    Path(preparation.output / "validation.sha256").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"validation\.sha256 is in the way"):
        preparation.run()


def test_list_that_was_written_but_not_recorded(preparation: Preparation, tmp_path: Path) -> None:
    preparation.output.mkdir()
    preparation.interrupt(commits=0)
    (preparation.output / "train.sha256").write_text("torn")
    preparation.run()
    preparation.run(tmp_path / "reference")
    assert without_lock(preparation.output) == without_lock(tmp_path / "reference")


def test_list_replaced_by_a_link(interrupted: Preparation, tmp_path: Path) -> None:
    path, outside = interrupted.output / "train.sha256", tmp_path / "outside"
    path.rename(outside)
    os.link(outside, path)
    before = outside.read_bytes()
    with pytest.raises(ValueError, match=r"train\.sha256 was replaced by a link"):
        interrupted.run()
    assert outside.read_bytes() == before


def test_complete_folder_keeps_checksums_of_the_user(preparation: Preparation) -> None:
    preparation.run()
    (preparation.output / "train.sha256").write_text("mine")
    preparation.run()
    assert (preparation.output / "train.sha256").read_text() == "mine"


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_open_shard_replaced_by_a_link(
    interrupted: Preparation, tmp_path: Path, link: object
) -> None:
    shard, outside = open_shard(interrupted.output), tmp_path / "outside"
    shard.rename(outside)
    with open(outside, "ab") as file:
        file.write(b"not to be cut")
    link(outside, shard)  # type: ignore[operator]
    before = outside.read_bytes()
    with pytest.raises(ValueError, match=rf"{shard.name} was replaced by a link"):
        interrupted.run()
    assert outside.read_bytes() == before


def test_unrecorded_shard_replaced_by_a_link(preparation: Preparation, tmp_path: Path) -> None:
    preparation.output.mkdir()
    preparation.interrupt(commits=0)
    assert PrepareProgress.load(preparation.output).tokens == 0
    shard = preparation.output / "train-00000.npy"
    shard.rename(tmp_path / "outside")
    shard.symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match=r"train-00000\.npy is in the way"):
        preparation.run()
    assert shard.is_symlink()


def test_another_job_replaces_only_unrecorded_shards(
    preparation: Preparation, tmp_path: Path
) -> None:
    output = preparation.output
    output.mkdir()
    preparation.interrupt(commits=0)
    assert PrepareProgress.load(output).splits["train"].created >= 1
    for name in ("train-images.npy", "train-99999.npy", "notes.txt"):
        (output / name).write_text("mine")
    preparation.run(shard_tokens=70)
    preparation.run(tmp_path / "reference", shard_tokens=70)
    for name in ("train-images.npy", "train-99999.npy", "notes.txt"):
        assert (output / name).read_text() == "mine"
        (output / name).unlink()
    assert without_lock(output) == without_lock(tmp_path / "reference")


def test_another_tokenizer_in_the_folder(interrupted: Preparation) -> None:
    path = interrupted.output / "tokenizer.json"
    save_tokenizer(train_tokenizer(["mine mine mine"], 262), path)
    before = contents(interrupted.output)
    with pytest.raises(ValueError, match=r"tokenizer\.json is damaged or not the tokenizer of"):
        interrupted.run()
    assert contents(interrupted.output) == before


def test_failed_start_keeps_files_of_the_user(
    preparation: Preparation, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "fastllama.data.prepare"

    def fail(*arguments: object) -> None:
        (preparation.output / "notes.txt").write_text("mine")
        raise ValueError("nothing can be encoded")

    with monkeypatch.context() as patch:
        patch.setattr(f"{module}._encode", fail)
        with pytest.raises(ValueError, match="nothing can be encoded"):
            preparation.run()
    assert without_lock(preparation.output) == {"notes.txt": b"mine"}


def test_inputs_that_are_not_utf8(preparation: Preparation, tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"corpus-\xff.jsonl")
    preparation.corpus.rename(odd)
    odd_preparation = Preparation(odd, preparation.tokenizer, preparation.output)
    odd_preparation.interrupt()
    odd_preparation.run()
    [[path, *_]] = json.loads((preparation.output / "job.json").read_text())["inputs"]
    assert path == str(tmp_path / "corpus-\\xff.jsonl")
