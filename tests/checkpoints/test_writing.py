"""Saving while training goes on: what is written, one at a time, and disks that refuse."""

import errno
import itertools
import json
import os
import resource
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import fastllama.checkpoints.writing as module
import fastllama.logs.sinks as logs
from fastllama.checkpoints.reading import find_damage, load_tensors, read_progress
from fastllama.checkpoints.state import TrainProgress, TrainState
from fastllama.checkpoints.writing import CheckpointWriter, file_numbers
from fastllama.cli import main
from fastllama.config import Config, load_recipe
from fastllama.distributed.world import World, distributed
from fastllama.training.setup import build_state
from fastllama_kernels import REFERENCE
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


def whole(tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()
        for name, tensor in tensors.items()
    }


def test_what_changes_after_save_is_not_written(
    state: TrainState,
    config: Config,
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changed, real = threading.Event(), module.dcp.save

    def save_late(*args: Any, **keywords: Any) -> Any:
        assert changed.wait(timeout=60)
        return real(*args, **keywords)

    monkeypatch.setattr(module.dcp, "save", save_late)
    before = whole(state.tensors())
    state.progress.spikes = [1.0, 2.0]
    said: list[str] = []
    with CheckpointWriter(tmp_path, config, {"seed": 1}, world.device, said.append) as writer:
        writer.save(state.tensors(), state.progress)
        for tensor in state.tensors().values():
            tensor.fill_(7.0)
        state.progress.step, state.progress.position = 99, 99
        state.progress.spikes.append(99.0)
        changed.set()
        writer.wait()
    path = tmp_path / "step-00000003"
    assert find_damage(path) is None
    assert read_progress(path) == TrainProgress(step=3, position=24, spikes=[1.0, 2.0])
    loaded = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    load_tensors(path, loaded)
    for name, tensor in before.items():
        assert torch.equal(loaded[name], tensor), name
    (sentence,) = said
    assert sentence.startswith(f"saved {path} (")
    assert sentence.endswith(" s written)")
    assert " s staged, " in sentence


def test_tensors_are_spread_over_files(
    state: TrainState,
    config: Config,
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limit = 10_000
    monkeypatch.setattr(module, "FILE_BYTES", limit)
    before = whole(state.tensors())
    assert sum(tensor.nbytes for tensor in before.values()) > 20 * limit
    with CheckpointWriter(tmp_path, config, {}, world.device, lambda sentence: None) as writer:
        writer.save(state.tensors(), state.progress)
    path = tmp_path / "step-00000003"
    assert find_damage(path) is None
    files = sorted(path.glob("*.safetensors"))
    n = len(files)
    assert [file.name for file in files] == [
        f"shard-00001-model-{number:05d}-of-{n:05d}.safetensors" for number in range(1, n + 1)
    ]
    held: list[str] = []
    sizes = []
    for file in files:
        with safe_open(str(file), framework="pt") as tensors:
            names = list(tensors.keys())
            assert set(json.loads(tensors.metadata()["DCP_SHARDING_INFO"])) == set(names)
        held += names
        sizes.append(sum(before[name].nbytes for name in names))
        assert sizes[-1] <= limit or len(names) == 1
    assert sorted(held) == sorted(before)
    # None could have been joined with the next one.
    assert all(sum(pair) > limit for pair in itertools.pairwise(sizes))
    loaded = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    load_tensors(path, loaded)
    for name, tensor in before.items():
        assert torch.equal(loaded[name], tensor), name
    files[n // 2].unlink()
    assert find_damage(path) == f"{files[n // 2]} is missing"


def test_every_rank_numbers_the_files_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FILE_BYTES", 100)
    for rank in range(8):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=8)
        mesh = init_device_mesh("cpu", (2, 4))
        # 200 bytes over 4 shards, of which the ranks hold 80, 80, 40 and none.
        split = {
            name: distribute_tensor(torch.zeros(5, 10), mesh, (Replicate(), Shard(0)))
            for name in ("c", "d", "e")
        }
        numbers = file_numbers({"b": torch.zeros(25), **split, "a": torch.zeros(100)})
        dist.destroy_process_group()
        assert numbers == {"a": 1, "b": 2, "c": 3, "d": 3, "e": 4}, rank


def test_the_write_waits_for_no_stream_but_its_own(
    state: TrainState,
    config: Config,
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    current, seen, real = ["training"], [], module.dcp.save

    @contextmanager
    def stream(name: str) -> Iterator[None]:
        current.append(name)
        yield
        current.pop()

    def save(*args: Any, **keywords: Any) -> Any:
        seen.append(current[-1])
        return real(*args, **keywords)

    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"another of {device}")
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(module.dcp, "save", save)
    writer = CheckpointWriter(tmp_path, config, {}, gpu, lambda sentence: None)
    writer._run(whole(state.tensors()), state.progress, 0.0)
    writer.wait()
    assert writer.saved_step == 3
    assert (seen, current) == (["another of cuda:0"], ["training"])


def test_a_save_waits_for_the_one_before(
    state: TrainState,
    config: Config,
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[str] = []
    real = module.dcp.save

    def slow(*args: Any, **keywords: Any) -> Any:
        order.append("begin")
        time.sleep(0.1)
        order.append("end")
        return real(*args, **keywords)

    monkeypatch.setattr(module.dcp, "save", slow)
    with CheckpointWriter(tmp_path, config, {}, world.device, lambda sentence: None) as writer:
        for step in (1, 2, 3):
            writer.save(state.tensors(), TrainProgress(step=step))
    # Leaving waits for the last.
    assert order == ["begin", "end"] * 3
    assert writer.saved_step == 3
    assert (tmp_path / "latest").resolve() == tmp_path / "step-00000003"


def refuse(monkeypatch: pytest.MonkeyPatch, where: str, times: list[int]) -> None:
    """Let the disk refuse, at the named place, the checkpoints of those numbers."""
    saved = 0

    def refuse_or(real: Any, name: str) -> Any:
        def wrapped(*args: Any, **keywords: Any) -> Any:
            concerned = any(name in str(argument) for argument in args)
            if concerned and saved in times:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **keywords)

        return wrapped

    make_room = CheckpointWriter._make_room

    def count(self: CheckpointWriter, aside: Path) -> None:
        nonlocal saved
        saved += 1
        make_room(self, aside)

    monkeypatch.setattr(CheckpointWriter, "_make_room", count)
    target, name, pattern = {
        "folder": (Path, "mkdir", ".partial"),
        "shard": (FileSystem, "create_stream", ".safetensors"),
        "checksums": (module, "describe", "shard"),
        "manifest": (module, "write_atomic", "manifest.json"),
        "rename": (module.os, "replace", ".step-"),
    }[where]
    monkeypatch.setattr(target, name, refuse_or(getattr(target, name), pattern))


@pytest.mark.parametrize("where", ["folder", "shard", "checksums", "manifest", "rename"])
def test_a_disk_that_refuses_costs_one_checkpoint(
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    where: str,
) -> None:
    run = tmp_path / "run"
    refuse(monkeypatch, where, times=[2])
    options = ["--checkpoint.interval-tokens", str(3 * 256)]
    main(["train", str(workspace.recipe), "--run-dir", str(run), *options])
    checkpoints = run / "checkpoints"
    told = [line for line in capsys.readouterr().out.splitlines() if "could not" in line]
    assert len(told) == 1
    assert told[0].startswith(
        f"The checkpoint {checkpoints / 'step-00000006'} could not be written"
    )
    assert "No space left on device" in told[0]
    assert told[0].endswith("; training continues, and the next one is due as planned.")
    left = sorted(path.name for path in checkpoints.iterdir())
    assert left == ["latest", "step-00000003", "step-00000009", "step-00000010"]


def test_a_last_checkpoint_that_is_refused_ends_with_one(
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    # The third is that of update 10, due by its tokens, the fourth the last attempt at it.
    refuse(monkeypatch, "manifest", times=[2, 3])
    with pytest.raises(SystemExit) as stop:
        main(["train", str(workspace.recipe), "--run-dir", str(run)])
    assert stop.value.code == 1
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith(
        f"error: The checkpoint {run / 'checkpoints' / 'step-00000010'} could"
    )
    assert [path.name for path in (run / "checkpoints").glob("*step*")] == ["step-00000005"]


def test_a_second_attempt_at_the_last_checkpoint_is_enough(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    refuse(monkeypatch, "manifest", times=[2])
    main(["train", str(workspace.recipe), "--run-dir", str(run)])
    assert find_damage(run / "checkpoints" / "step-00000010") is None


def test_old_checkpoints_that_cannot_be_removed_cost_nothing(
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse_removal(path: Path, ignore_errors: bool = False) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    run = tmp_path / "run"
    monkeypatch.setattr(module.shutil, "rmtree", refuse_removal)
    main(["train", str(workspace.recipe), "--run-dir", str(run), "--checkpoint.keep-last", "1"])
    newest = run / "checkpoints" / "step-00000010"
    assert find_damage(newest) is None
    told = f"Checkpoints before {newest} could not be removed: [Errno 30] Read-only file system"
    assert told in " ".join(capsys.readouterr().out.split())


def test_rows_wait_for_a_disk_that_is_full(
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, real, calls = tmp_path / "run", logs.append, 0

    def append(path: Path, text: str) -> None:
        nonlocal calls
        calls += path.name == "metrics.csv"
        if calls in (4, 5):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, text)

    monkeypatch.setattr(logs, "append", append)
    main(["train", str(workspace.recipe), "--run-dir", str(run)])
    printed = capsys.readouterr().out
    for step in (4, 5):
        assert f"The row of update {step} could not be written: [Errno 28]" in printed
    rows = (run / "metrics.csv").read_text().splitlines()[1:]
    assert [int(row.split(",")[0]) for row in rows] == list(range(1, 11))
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 11))


def test_a_line_that_fits_in_half_leaves_nothing(tmp_path: Path) -> None:
    log, limit = tmp_path / "log", resource.getrlimit(resource.RLIMIT_FSIZE)
    logs.append(log, "first\n")
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            logs.append(log, "second line\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert log.read_text() == "first\n"


def test_tensorboard_that_fails_does_not_stop_training(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def refuse_event(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("add_scalar", "close"):
        monkeypatch.setattr(SummaryWriter, name, refuse_event)
    run = tmp_path / "run"
    main(["train", str(workspace.recipe), "--run-dir", str(run), "--logging.tensorboard", "true"])
    assert len((run / "metrics.csv").read_text().splitlines()) == 11


@pytest.mark.parametrize("gone", ["checkpoints", "."])
def test_a_folder_that_vanishes_does_not_stop_training(
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    gone: str,
) -> None:
    import fastllama.train as trainer

    run, real, updates = tmp_path / "run", trainer.update, 0

    def update(*args: Any) -> Any:
        nonlocal updates
        updates += 1
        if updates == 7:
            shutil.rmtree(run / gone)
        return real(*args)

    monkeypatch.setattr(trainer, "update", update)
    arguments = ["train", str(workspace.recipe), "--run-dir", str(run)]
    if gone == "checkpoints":
        main(arguments)
        assert find_damage(run / "checkpoints" / "step-00000010") is None
        return
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 1
    assert updates == 10
    printed = capsys.readouterr()
    assert "The row of update 8 could not be written: " in printed.out
    assert "step-00000010 could not be written: " in printed.err
    # The mount point of a disk that is gone is not the place for a run without its options.
    assert not run.exists()
