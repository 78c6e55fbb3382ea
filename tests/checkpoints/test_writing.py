"""Writing checkpoints while training continues: contents, files, order, disk errors."""

import errno
import itertools
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.distributed.tensor import DTensor

import fastllama.checkpoints.writing as module
import fastllama.train as trainer
from fastllama.checkpoints import shards
from fastllama.checkpoints.reading import find_damage, load_tensors, read_progress
from fastllama.checkpoints.state import TrainProgress, TrainState
from fastllama.checkpoints.writing import CheckpointWriter
from fastllama.config import Config, load_recipe
from fastllama.distributed.world import World, distributed
from fastllama.training.setup import build_state
from fastllama_kernels import REFERENCE
from tests.runs import train
from tests.sessions import fresh_start, resolved_session
from tests.workspace import Workspace


@pytest.fixture
def config(workspace: Workspace) -> Config:
    return load_recipe(workspace.recipe)


@pytest.fixture
def world(config: Config) -> Iterator[World]:
    with distributed(config) as world:
        yield world


@pytest.fixture
def state(config: Config, world: World) -> TrainState:
    start = fresh_start(TrainProgress(step=3, position=24))
    return build_state(resolved_session(config, world), start, REFERENCE)


def full_copies(tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Copies of the tensors, gathered from their shards."""
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()
        for name, tensor in tensors.items()
    }


def test_changes_after_save_are_not_written(
    state: TrainState,
    config: Config,
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changed, original = threading.Event(), module.dcp.save

    def save_late(*args: Any, **keywords: Any) -> Any:
        assert changed.wait(timeout=60)
        return original(*args, **keywords)

    monkeypatch.setattr(module.dcp, "save", save_late)
    before = full_copies(state.tensors())
    state.progress.spikes = [1.0, 2.0, 3.0, 4.0, 5.0]
    reports: list[str] = []
    with CheckpointWriter(tmp_path, config, {"seed": 1}, world.device, reports.append) as writer:
        writer.save(state.tensors(), state.progress)
        for tensor in state.tensors().values():
            tensor.fill_(7.0)
        state.progress.step, state.progress.position = 99, 99
        state.progress.spikes.append(99.0)
        changed.set()
        writer.wait()
    path = tmp_path / "step-00000003"
    assert find_damage(path) is None
    assert read_progress(path) == TrainProgress(
        step=3, position=24, spikes=[1.0, 2.0, 3.0, 4.0, 5.0]
    )
    loaded = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    load_tensors(path, loaded)
    for name, tensor in before.items():
        assert torch.equal(loaded[name], tensor), name
    (report,) = reports
    assert report.startswith(f"saved {path} (")
    assert report.endswith(" s written)")
    assert " s staged, " in report


def test_files_are_filled_up_to_the_limit(
    state: TrainState,
    config: Config,
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limit = 10_000
    monkeypatch.setattr(shards, "FILE_BYTES", limit)
    before = full_copies(state.tensors())
    assert sum(tensor.nbytes for tensor in before.values()) > 20 * limit
    with CheckpointWriter(tmp_path, config, {}, world.device, lambda report: None) as writer:
        writer.save(state.tensors(), state.progress)
    path = tmp_path / "step-00000003"
    assert find_damage(path) is None
    files = sorted(path.glob("*.safetensors"))
    n = len(files)
    assert [file.name for file in files] == [
        f"shard-00001-model-{number:05d}-of-{n:05d}.safetensors" for number in range(1, n + 1)
    ]
    saved_names: list[str] = []
    sizes = []
    for file in files:
        with safe_open(str(file), framework="pt") as tensors:
            names = list(tensors.keys())
            assert set(json.loads(tensors.metadata()["DCP_SHARDING_INFO"])) == set(names)
        saved_names += names
        sizes.append(sum(before[name].nbytes for name in names))
        assert sizes[-1] <= limit or len(names) == 1
    assert sorted(saved_names) == sorted(before)
    # No file could also hold the tensors of the next one.
    assert all(sum(pair) > limit for pair in itertools.pairwise(sizes))
    loaded = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    load_tensors(path, loaded)
    for name, tensor in before.items():
        assert torch.equal(loaded[name], tensor), name
    files[n // 2].unlink()
    assert find_damage(path) == f"{files[n // 2]} is missing"


def test_saves_do_not_overlap(
    state: TrainState,
    config: Config,
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[str] = []
    original = module.dcp.save

    def slow_save(*args: Any, **keywords: Any) -> Any:
        order.append("begin")
        time.sleep(0.1)
        order.append("end")
        return original(*args, **keywords)

    monkeypatch.setattr(module.dcp, "save", slow_save)
    with CheckpointWriter(tmp_path, config, {}, world.device, lambda report: None) as writer:
        for step in (1, 2, 3):
            writer.save(state.tensors(), TrainProgress(step=step))
    # Leaving the context waits for the last save.
    assert order == ["begin", "end"] * 3
    assert writer.saved_step == 3
    assert (tmp_path / "latest").resolve() == tmp_path / "step-00000003"


def fill_disk(monkeypatch: pytest.MonkeyPatch, where: str, saves: list[int]) -> None:
    """Raise ENOSPC at step `where` of these saves, counted from 1."""
    n_saves = 0

    def fail_on(original: Any, pattern: str) -> Any:
        def wrapped(*args: Any, **keywords: Any) -> Any:
            matches = any(pattern in str(argument) for argument in args)
            if matches and n_saves in saves:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*args, **keywords)

        return wrapped

    make_room = CheckpointWriter._make_room

    def count_saves(self: CheckpointWriter, aside: Path) -> None:
        nonlocal n_saves
        n_saves += 1
        make_room(self, aside)

    monkeypatch.setattr(CheckpointWriter, "_make_room", count_saves)
    target, name, pattern = {
        "folder": (Path, "mkdir", ".partial"),
        "shard": (shards, "write_shard", ".safetensors"),
        "checksums": (module, "describe", "progress.json"),
        "manifest": (module, "write_atomic", "manifest.json"),
        "rename": (os, "replace", ".step-"),
    }[where]
    monkeypatch.setattr(target, name, fail_on(getattr(target, name), pattern))


@pytest.mark.parametrize("where", ["folder", "shard", "checksums", "manifest", "rename"])
def test_full_disk_loses_only_that_checkpoint(
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    where: str,
) -> None:
    run = tmp_path / "run"
    fill_disk(monkeypatch, where, saves=[2])
    train(workspace.recipe, "--run-dir", run, "--checkpoint.interval-tokens", 3 * 256)
    checkpoints = run / "checkpoints"
    (error,) = (line for line in capsys.readouterr().out.splitlines() if "could not" in line)
    assert error.startswith(f"The checkpoint {checkpoints / 'step-00000006'} could not be written")
    assert "No space left on device" in error
    assert error.endswith("; training continues, and the next one is due as planned.")
    names = sorted(path.name for path in checkpoints.iterdir())
    assert names == ["latest", "step-00000003", "step-00000009", "step-00000010"]


@pytest.mark.parametrize("where", ["shard", "manifest"])
def test_full_disk_takes_the_room_of_the_checkpoint_that_is_replaced(
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    where: str,
) -> None:
    run = tmp_path / "run"
    # Save 3, of update 6, fails once; save 4 repeats it.
    fill_disk(monkeypatch, where, saves=[3])
    options = ("--checkpoint.interval-tokens", 2 * 256, "--checkpoint.keep-last", 2)
    train(workspace.recipe, "--run-dir", run, *options)
    printed = capsys.readouterr().out
    assert "The disk is full: removed step-00000002 before saving step-00000006." in printed
    assert "could not be written" not in printed
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["latest", "step-00000008", "step-00000010"]


def test_full_disk_never_takes_the_only_checkpoint(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    fill_disk(monkeypatch, "manifest", saves=[2, 3])
    with pytest.raises(SystemExit):
        train(workspace.recipe, "--run-dir", run, "--checkpoint.keep-last", 1)
    assert [path.name for path in (run / "checkpoints").glob("step*")] == ["step-00000005"]


def test_failed_last_checkpoint_exits_with_1(
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    # Save 1 is update 5. Save 2 is update 10, when its tokens are due; save 3 tries it again at
    # the end.
    fill_disk(monkeypatch, "manifest", saves=[2, 3])
    with pytest.raises(SystemExit) as stop:
        train(workspace.recipe, "--run-dir", run)
    assert stop.value.code == 1
    printed = capsys.readouterr()
    assert "training continues" not in printed.out
    (message,) = printed.err.splitlines()
    assert message.startswith(
        f"error: The checkpoint {run / 'checkpoints' / 'step-00000010'} could"
    )
    assert message.endswith("; mend this, and the same command goes on from step-00000005.")
    assert [path.name for path in (run / "checkpoints").glob("*step*")] == ["step-00000005"]


def test_last_checkpoint_is_tried_twice(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    fill_disk(monkeypatch, "manifest", saves=[2])
    train(workspace.recipe, "--run-dir", run)
    assert find_damage(run / "checkpoints" / "step-00000010") is None


def test_failed_removal_of_old_checkpoints_is_reported(
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(folder: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    run = tmp_path / "run"
    monkeypatch.setattr("fastllama.checkpoints.folder.remove_files", fail)
    train(workspace.recipe, "--run-dir", run, "--checkpoint.keep-last", 1)
    checkpoints = run / "checkpoints"
    assert find_damage(checkpoints / "step-00000010") is None
    report = f"{checkpoints / 'step-00000005'} cannot be removed (Read-only file system)."
    assert report in capsys.readouterr().err.splitlines()


def test_leftovers_of_a_killed_save_are_removed_by_the_next(run: Path) -> None:
    checkpoints = run / "checkpoints"
    for name in (".step-00000007.partial", ".step-00000001.removed"):
        (checkpoints / name).mkdir()
        (checkpoints / name / "progress.json").touch()
        (checkpoints / name / ".manifest.json.partial").touch()
    train("--resume", run, "--training.training-tokens", 11 * 256)
    names = sorted(path.name for path in checkpoints.iterdir())
    assert names == ["latest", "step-00000005", "step-00000010", "step-00000011"]


@pytest.mark.parametrize("kind", ["file", "link", "dangling link", "folder with notes"])
def test_leftover_of_another_kind_stops_no_save(run: Path, tmp_path: Path, kind: str) -> None:
    checkpoints, outside = run / "checkpoints", tmp_path / "outside"
    outside.mkdir()
    (outside / "progress.json").write_text("kept")
    leftovers = {".step-00000011.partial", ".step-00000005.removed", ".step-00000001.removed"}
    for name in leftovers:
        path = checkpoints / name
        if kind == "file":
            path.touch()
        elif kind == "folder with notes":
            path.mkdir()
            (path / "notes.txt").write_text("kept")
        else:
            path.symlink_to(outside if kind == "link" else "nothing")
    train("--resume", run, "--training.training-tokens", 11 * 256, "--checkpoint.keep-last", 1)
    assert find_damage(checkpoints / "step-00000011") is None
    assert (outside / "progress.json").read_text() == "kept"
    # A name that the save and its removals needed was set aside; the others are as they were.
    assert {path.name for path in checkpoints.iterdir()} == {
        *("latest", "step-00000011", ".step-00000001.removed"),
        *("passed-over-.step-00000011.partial-1", "passed-over-.step-00000005.removed-1"),
    }
    if kind == "folder with notes":
        assert len(list(checkpoints.rglob("notes.txt"))) == len(leftovers)


def test_taken_name_stops_no_save(
    state: TrainState, config: Config, world: World, tmp_path: Path
) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "step-00000003").symlink_to("outside")
    (tmp_path / "step-00000004").write_text("mine")
    with CheckpointWriter(tmp_path, config, {}, world.device, lambda report: None) as writer:
        for step in (3, 4):
            writer.save(state.tensors(), TrainProgress(step=step))
            writer.wait()
            assert find_damage(tmp_path / f"step-0000000{step}") is None
    assert not list((tmp_path / "outside").iterdir())
    assert (tmp_path / "passed-over-step-00000003-1").is_symlink()
    assert (tmp_path / "passed-over-step-00000004-1").read_text() == "mine"


def test_copy_without_memory_loses_only_that_checkpoint(
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original, n_saves = TrainState.tensors, 0

    class TooLarge:
        def to(self, *arguments: Any, **keywords: Any) -> Any:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried\nto allocate")

    def tensors(state: TrainState) -> Any:
        nonlocal n_saves
        n_saves += 1
        return {"large": TooLarge()} if n_saves == 1 else original(state)

    monkeypatch.setattr(TrainState, "tensors", tensors)
    run = tmp_path / "run"
    train(workspace.recipe, "--run-dir", run)
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-00000010"]
    assert (
        f"The checkpoint {run / 'checkpoints' / 'step-00000005'} could not be written: the host "
        "has no memory for a copy (DefaultCPUAllocator: can't allocate memory: you tried); "
        "training continues"
    ) in capsys.readouterr().out


def fail_once(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Let the first file of tensors raise `error`."""
    original, n_files = shards.write_shard, itertools.count()

    def write_shard(*arguments: Any) -> Any:
        if not next(n_files):
            raise error
        return original(*arguments)

    monkeypatch.setattr(shards, "write_shard", write_shard)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "the host has no memory left"),
        (RuntimeError("can't start new thread"), "can't start new thread"),
    ],
)
def test_write_without_resources_loses_only_that_checkpoint(
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    reason: str,
) -> None:
    run = tmp_path / "run"
    fail_once(monkeypatch, error)
    train(workspace.recipe, "--run-dir", run)
    assert f"step-00000005 could not be written: {reason}; training" in capsys.readouterr().out
    assert [path.name for path in (run / "checkpoints").glob("*step-*")] == ["step-00000010"]


def test_mistake_in_the_code_is_no_failure_of_the_disk(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_once(monkeypatch, KeyError("float8"))
    with pytest.raises(KeyError, match="float8"):
        train(workspace.recipe, "--run-dir", tmp_path / "run")


@pytest.mark.parametrize("removed", ["checkpoints", "."])
def test_training_survives_a_removed_folder(
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    removed: str,
) -> None:
    run, original, updates = tmp_path / "run", trainer.update, 0

    def update(*args: Any) -> Any:
        nonlocal updates
        updates += 1
        if updates == 7:
            shutil.rmtree(run / removed)
        return original(*args)

    monkeypatch.setattr(trainer, "update", update)
    if removed == "checkpoints":
        train(workspace.recipe, "--run-dir", run)
        assert find_damage(run / "checkpoints" / "step-00000010") is None
        return
    with pytest.raises(SystemExit) as stop:
        train(workspace.recipe, "--run-dir", run)
    assert stop.value.code == 1
    assert updates == 10
    printed = capsys.readouterr()
    assert f"{run / 'metrics.csv'}: the last " in printed.out
    assert "step-00000010 could not be written: " in printed.err
    # The run folder must not reappear without its options, say below an unmounted mount point.
    assert not run.exists()
