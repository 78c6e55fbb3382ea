"""The folder of checkpoints: its files, its link, and which checkpoints are kept."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from fastllama import atomic
from fastllama.checkpoints.folder import latest_name, point_latest, remove_old
from fastllama.checkpoints.reading import find_damage
from fastllama.config import CheckpointConfig, Config, TrainingConfig
from tests.runs import train
from tests.workspace import Workspace


def test_files_of_a_checkpoint(run: Path) -> None:
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["latest", "step-00000005", "step-00000010"]
    files = sorted(path.name for path in (run / "checkpoints" / "latest").iterdir())
    assert files[:2] == ["manifest.json", "progress.json"]
    assert [Path(name).suffix for name in files[2:]] == [".safetensors"]


def test_stale_latest_link_is_repaired(workspace: Workspace, run: Path) -> None:
    latest = run / "checkpoints" / "latest"
    latest.unlink()
    # The state after a kill between the last checkpoint's rename and its link.
    latest.symlink_to("step-00000005")
    train(workspace.recipe, "--run-dir", run)
    assert latest.resolve().name == "step-00000010"


@pytest.fixture(autouse=True)
def nothing_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what this process has reported."""
    monkeypatch.setattr(atomic, "_reported", set())


def refuse(*arguments: Any, **keywords: Any) -> None:
    """A function of the system that is not permitted."""
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


@pytest.mark.parametrize("leftover", ["nothing", "link", "file", "folder"])
def test_latest_is_replaced(tmp_path: Path, leftover: str) -> None:
    aside = tmp_path / ".latest.partial"
    if leftover == "link":
        aside.symlink_to("step-00000004")
    elif leftover == "file":
        aside.touch()
    elif leftover == "folder":
        aside.mkdir()
    (tmp_path / "step-00000008").mkdir()
    for _ in range(2):
        point_latest(tmp_path / "step-00000008")
        assert os.readlink(tmp_path / "latest") == "step-00000008"
        assert not os.path.lexists(aside)


def test_latest_that_cannot_be_renamed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = os.replace

    def replace(source: Path, target: Path) -> None:
        if os.path.lexists(target):
            refuse()
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(atomic, "RENAME_PAUSE_S", 0)
    for step in (4, 8, 12):
        point_latest(tmp_path / f"step-{step:08d}")
        assert latest_name(tmp_path) == f"step-{step:08d}"
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path / 'latest'} cannot be a link (Operation not permitted); ")


def test_foreign_latest_is_set_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    latest, aside = tmp_path / "latest", tmp_path / "passed-over-latest-1"
    for content in ("a folder", "my notes\n", 200 * "x"):
        if content == "a folder":
            latest.mkdir()
            (latest / "manifest.json").write_text("{}")
        else:
            latest.write_text(content)
        point_latest(tmp_path / "step-00000008")
        assert os.readlink(latest) == "step-00000008"
        if content == "a folder":
            assert (aside / "manifest.json").read_text() == "{}"
            shutil.rmtree(aside)
        else:
            assert aside.read_text() == content
            aside.unlink()
        latest.unlink()
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"{latest} was in the way; it is kept as passed-over-latest-1."


def test_latest_of_a_zip_file_is_replaced(tmp_path: Path) -> None:
    # Where links are impossible, zip and git write the target of a link into a file.
    (tmp_path / "latest").write_text("step-00000004")
    point_latest(tmp_path / "step-00000008")
    assert os.readlink(tmp_path / "latest") == "step-00000008"
    assert not list(tmp_path.glob("passed-over-*"))


def test_missing_links_are_reported_once(
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(Path, "symlink_to", refuse)
    monkeypatch.setattr(os, "symlink", refuse)
    train(workspace.recipe, "--run-dir", run, "--checkpoint.keep-last", 1)
    latest = run / "checkpoints" / "latest"
    assert latest.read_text() == "step-00000010\n"
    assert {path.name for path in latest.parent.iterdir()} == {"latest", "step-00000010"}
    train("--resume", run, "--training.training-tokens", 12 * 256)
    assert latest.read_text() == "step-00000012\n"
    lines = [line for line in capsys.readouterr().err.splitlines() if str(latest) in line]
    assert lines == [
        f"{latest} cannot be a link (Operation not permitted); it is a text file with the name of "
        "the checkpoint."
    ]


def test_removal_does_not_wait_for_latest(
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(Path, "symlink_to", refuse)
    monkeypatch.setattr("fastllama.checkpoints.folder.write_atomic", refuse)
    train(workspace.recipe, "--run-dir", run, "--checkpoint.keep-last", 1)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000010"]
    latest = run / "checkpoints" / "latest"
    reported = f"{latest} cannot be written (Operation not permitted)."
    assert capsys.readouterr().err.splitlines().count(reported) == 1


def keep(last: int, every_tokens: int = 0) -> Config:
    """A run of 256 tokens per update, with these options for what to keep."""
    return Config(
        training=TrainingConfig(tokens_per_update=256),
        checkpoint=CheckpointConfig(keep_last=last, keep_every_tokens=every_tokens),
    )


def test_keep_last(run: Path) -> None:
    checkpoints = run / "checkpoints"
    remove_old(checkpoints / "step-00000010", keep(last=1))
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step-00000010"]
    assert find_damage(checkpoints / "latest") is None


def test_keep_every_tokens(tmp_path: Path) -> None:
    kept = set()
    for step in range(3, 31, 3):
        (tmp_path / f"step-{step:08d}").mkdir()
        # The multiples are updates 8, 16 and 24; the first checkpoints at or after them are those
        # of updates 9, 18 and 24.
        remove_old(tmp_path / f"step-{step:08d}", keep(last=2, every_tokens=8 * 256))
        kept = {int(path.name.removeprefix("step-")) for path in tmp_path.iterdir()}
        assert {9, 18, 24, step, step - 3} & set(range(3, step + 1)) == kept
    assert kept == {9, 18, 24, 27, 30}


def test_other_folders_stay(run: Path) -> None:
    checkpoints = run / "checkpoints"
    for name in ("step-final", "step-1", "checkpoint-20", "step-00000004.bak"):
        (checkpoints / name).mkdir()
    remove_old(checkpoints / "step-00000010", keep(last=1))
    names = sorted(path.name for path in checkpoints.iterdir())
    assert names == [
        "checkpoint-20",
        "latest",
        "step-00000004.bak",
        "step-00000010",
        "step-1",
        "step-final",
    ]


def test_links_and_files_stay(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints, disk = run / "checkpoints", tmp_path / "disk"
    disk.mkdir()
    shutil.move(checkpoints / "step-00000005", disk)
    (checkpoints / "step-00000005").symlink_to(disk / "step-00000005")
    (checkpoints / "step-00000004").write_text("mine")
    (checkpoints / "step-00000003").symlink_to("nothing")
    shutil.copytree(checkpoints / "step-00000010", checkpoints / "step-00000006")
    for _ in range(2):
        remove_old(checkpoints / "step-00000010", keep(last=1))
    assert sorted(path.name for path in checkpoints.glob("step-*")) == [
        *("step-00000003", "step-00000004", "step-00000005", "step-00000010")
    ]
    assert find_damage(disk / "step-00000005") is None
    assert capsys.readouterr().err.splitlines() == [
        f"{checkpoints / name} is not removed: it is a link or a file."
        for name in ("step-00000003", "step-00000004", "step-00000005")
    ]


def test_linked_checkpoint_may_be_the_permanent_one(run: Path, tmp_path: Path) -> None:
    checkpoints = run / "checkpoints"
    shutil.move(checkpoints / "step-00000005", tmp_path)
    (checkpoints / "step-00000005").symlink_to(tmp_path / "step-00000005")
    shutil.copytree(checkpoints / "step-00000010", checkpoints / "step-00000006")
    remove_old(checkpoints / "step-00000010", keep(last=1, every_tokens=5 * 256))
    assert sorted(path.name for path in checkpoints.glob("step-*")) == [
        *("step-00000005", "step-00000010")
    ]


def test_checkpoint_with_other_files_stays(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = run / "checkpoints"
    (checkpoints / "step-00000005" / "notes.txt").write_text("the best so far")
    remove_old(checkpoints / "step-00000010", keep(last=1))
    assert (checkpoints / "step-00000005" / "notes.txt").exists()
    assert find_damage(checkpoints / "step-00000005") is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("step-00000005 is not removed: notes.txt is not part of a checkpoint.")


def test_one_failed_removal_stops_no_other(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints, original = run / "checkpoints", os.replace
    shutil.copytree(checkpoints / "step-00000005", checkpoints / "step-00000006")

    def replace(source: Path, target: Path) -> None:
        if source.name == "step-00000005":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    remove_old(checkpoints / "step-00000010", keep(last=1))
    assert sorted(path.name for path in checkpoints.glob("step-*")) == [
        *("step-00000005", "step-00000010")
    ]
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (f"{checkpoints / 'step-00000005'} cannot be removed (Read-only file system).")
