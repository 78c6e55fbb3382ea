"""Results of updates, from a simulated GPU to the rows of the log."""

import gc
import time
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import fastllama.train as trainer
from fastllama.checkpoints.state import TrainProgress
from fastllama.config import Config, LoggingConfig, TrainingConfig
from fastllama.distributed.world import World
from fastllama.logs.rows import read_rows
from fastllama.training.monitor import UpdateMonitor
from tests.runs import train
from tests.sessions import bare_session
from tests.workspace import Workspace


class Device:
    """A simulated GPU and its host, each with its own time in seconds.

    `torch.cuda.Event` records the GPU's time, and `time.perf_counter` is the host's.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host = self.busy_until = 100.0
        device = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.reached = max(device.host, device.busy_until)

            def synchronize(self) -> None:
                device.host = max(device.host, self.reached)

            def elapsed_time(self, end: "Event") -> float:
                assert device.host >= end.reached, "the event is not complete yet"
                return (end.reached - self.reached) * 1000

        monkeypatch.setattr(time, "perf_counter", lambda: self.host)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "no known GPU")

    def launch(self, seconds: float) -> None:
        """Launch kernels that take this long."""
        self.busy_until = max(self.host, self.busy_until) + seconds
        # The host runs at most a quarter of an update ahead: then the loader's ring of buffers is
        # full.
        self.host = max(self.host, self.busy_until - 2.5)


def test_rows_report_device_time_without_side_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(monkeypatch)
    config = Config(
        training=TrainingConfig(tokens_per_update=8_192, training_tokens=8 * 8_192),
        logging=LoggingConfig(log_interval=1, tensorboard=False),
    )
    progress = TrainProgress()
    world = World(0, 1, torch.device("cuda"), cast(Any, None))
    session = bare_session(config, world, run=tmp_path)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**29)
    monitor = UpdateMonitor(session, progress)
    for step in range(1, 9):
        if step == 6:
            # The data arrives 3 seconds after the device has finished all earlier updates.
            device.host = device.busy_until + 3.0
        device.launch(10.0)
        progress.step = step
        monitor.push(torch.tensor([2.0, 1.0, 0.0, 0.0]), data_wait_seconds=0.0)
        if step in (3, 4):
            with monitor.side_job():
                device.launch(7.0)
                device.host = device.busy_until + 2.0
                monitor.recorder.add_validation({"held out": (2.5, 1.0)})
    monitor.flush()
    rows = read_rows(tmp_path / "metrics.csv")
    seconds = [8_192 / row["tok_per_s"] for row in rows]
    assert seconds == pytest.approx([10, 10, 10, 10, 10, 13, 10, 10])
    assert [row["peak_gib"] for row in rows] == [1.5] * 8


def test_no_update_collects_the_garbage_of_others(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, counts = trainer.update, []

    def update(*arguments: Any) -> Any:
        counts.append((len(gc.get_objects()), gc.get_freeze_count()))
        return original(*arguments)

    monkeypatch.setattr(trainer, "update", update)
    train(workspace.recipe, "--run-dir", tmp_path / "run")
    # A collection looks at the first number of objects. Validation after update 5 makes more.
    assert all(seen < frozen / 20 for seen, frozen in counts[1:])
    assert gc.get_freeze_count() == 0
