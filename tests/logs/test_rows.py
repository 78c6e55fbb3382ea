import contextlib
import csv
import json
import math
import time
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from rich.console import Console

from fastllama.checkpoints.state import TrainProgress
from fastllama.config import Config, LoggingConfig, TrainingConfig
from fastllama.distributed.world import World
from fastllama.logs.clocks import Clock, LateScalars
from fastllama.logs.recorder import Recorder
from fastllama.logs.rows import COLUMNS, Row, duration, human
from fastllama.logs.sinks import MetricsLog, plot_loss, read_rows
from fastllama.run_folder import RunFolder

HEADER = (
    "step,tokens,tokens_total,loss,perplexity,lr,grad_norm,tok_per_s,time_s,data_wait_s,"
    "skipped_steps"
)


def row(step: int, loss: float = 2.0, val_loss: float | None = None) -> Row:
    return Row(
        step=step,
        tokens=1024 * step,
        tokens_total=10**7 + 1024 * step,
        loss=loss,
        perplexity=math.exp(loss),
        lr=3e-4,
        grad_norm=0.5,
        tok_per_s=12345.6,
        time_s=3723.0,
        data_wait_s=0.25,
        skipped_steps=0,
        progress=0.125,
        eta_s=59.7,
        val_loss=val_loss,
        val_bits_per_byte=None if val_loss is None else val_loss / 4,
    )


def write_rows(run: Path, *rows: Row, last_step: int = 0) -> None:
    log = MetricsLog(run, last_step, tensorboard=False)
    for each in rows:
        log.write(each)
    log.close()


def steps(path: Path) -> list[int]:
    return [int(each["step"]) for each in read_rows(path)]


def test_console_line() -> None:
    line = row(7).line()
    assert line == (
        "step 7   12.5%  loss 2.0000  ppl 7.4  lr 3.00e-04  gnorm 0.50  tok 10.0M  "
        "12,346 tok/s  1:02:03  eta 1:00  wait 0.25s"
    )


def test_console_line_tells_what_is_rare() -> None:
    rare = row(7, val_loss=3.0)
    rare.skipped_steps, rare.mfu_causal, rare.mfu_palm, rare.peak_gib = 2, 0.4, 0.45, 71.26
    assert rare.line().startswith(row(7).line())
    assert rare.line().endswith(
        "mfu 40.0% causal 45.0% palm  peak 71.3 GiB  skipped 2  val 3.0000 (0.750 bits/byte)"
    )


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (9_216, "9,216"),
        (102_400, "102.4k"),
        (1_000_000, "1.0M"),
        (1_300_000_000, "1.3B"),
        (15 * 10**12, "15.0T"),
    ],
)
def test_human(count: int, text: str) -> None:
    assert human(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.7, "1:00"), (123, "2:03"), (3599.6, "1:00:00"), (90061, "25:01:01")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_clock_leaves_side_jobs_out_even_when_they_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock = Clock()
    now = 110.0
    with clock.side_job():
        now = 115.0
    with contextlib.suppress(OSError), clock.side_job():
        now = 116.0
        raise OSError("the disk is full")
    now = 120.0
    assert (clock.wall(), clock.training()) == (20.0, 14.0)


class Device:
    """A GPU and its host, each with a time of its own in seconds; the events are the GPU's."""

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
                assert device.host >= end.reached, "CUDA does not know yet"
                return (end.reached - self.reached) * 1000

        monkeypatch.setattr(time, "perf_counter", lambda: self.host)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "unheard of")

    def launch(self, seconds: float) -> None:
        self.busy_until = max(self.host, self.busy_until) + seconds
        # A quarter of an update is as far as the host gets ahead, for want of a free buffer.
        self.host = max(self.host, self.busy_until - 2.5)


def test_rows_beside_side_jobs_tell_the_pace_of_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(monkeypatch)
    config = Config(
        training=TrainingConfig(tokens_per_update=8_192, training_tokens=8 * 8_192),
        logging=LoggingConfig(log_interval=1, tensorboard=False),
    )
    nothing, progress = cast(Any, None), TrainProgress()
    world = World(0, 1, torch.device("cuda"), nothing)
    console = Console(quiet=True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**29)
    recorder = Recorder(config, RunFolder(tmp_path), nothing, progress, world, console)
    for step in range(1, 9):
        if step == 6:
            # The data comes 3 seconds after the device is done with what it was handed.
            device.host = device.busy_until + 3.0
        device.launch(10.0)
        progress.step = step
        recorder.push(torch.tensor([2.0, 1.0, 0.0, 0.0]), wait_seconds=0.0)
        if step in (3, 4):
            with recorder.side_job():
                device.launch(7.0)
                device.host = device.busy_until + 2.0
                recorder.add_validation(2.5, 1.0)
    recorder.flush()
    rows = read_rows(tmp_path / "metrics.csv")
    seconds = [8_192 / row["tok_per_s"] for row in rows]
    assert seconds == pytest.approx([10, 10, 10, 10, 10, 13, 10, 10])
    assert [row["peak_gib"] for row in rows] == [1.5] * 8


def test_late_scalars_are_the_last_sent() -> None:
    late = LateScalars()
    late.send(torch.tensor([1.0, 2.0]))
    late.send(torch.tensor([3.0, 4.5]))
    assert late.receive() == [3.0, 4.5]


def test_the_first_columns_are_promised_to_other_tools(tmp_path: Path) -> None:
    write_rows(tmp_path)
    header = (tmp_path / "metrics.csv").read_text()
    assert header.startswith(HEADER)
    assert header == ",".join(COLUMNS) + "\n"


def test_rows_are_appended_to_both_files(tmp_path: Path) -> None:
    write_rows(tmp_path, row(1))
    write_rows(tmp_path, row(2, val_loss=3.0), last_step=1)
    with open(tmp_path / "metrics.csv", newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["step"], first["val_loss"]) == ("1", "")
    assert (second["step"], second["val_loss"]) == ("2", "3.0")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [list(line) for line in lines] == [COLUMNS, COLUMNS]
    assert [line["val_loss"] for line in lines] == [None, 3.0]
    assert read_rows(tmp_path / "metrics.csv")[0]["perplexity"] == math.exp(2.0)


def test_a_log_from_before_a_column_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    write_rows(tmp_path, row(1, val_loss=3.0), row(2))
    old = [line.rpartition(",")[0] for line in path.read_text().splitlines()]
    path.write_text("".join(f"{line}\n" for line in old))
    new = row(3)
    new.peak_gib = 71.5
    write_rows(tmp_path, new, last_step=2)
    with open(path, newline="") as file:
        assert [len(line) for line in csv.reader(file)] == [len(COLUMNS)] * 4
    first, second, third = read_rows(path)
    assert (first["val_loss"], third["peak_gib"]) == (3.0, 71.5)
    assert "peak_gib" not in first | second
    plot_loss(path, tmp_path / "loss.png", title="run")


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_what_json_lacks_is_null(tmp_path: Path, loss: float) -> None:
    bad = row(1)
    bad.loss = loss
    write_rows(tmp_path, bad)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] is None
    assert read_rows(tmp_path / "metrics.csv")[0]["loss"] == pytest.approx(loss, nan_ok=True)


def test_resuming_moves_the_rows_to_be_done_again(tmp_path: Path) -> None:
    write_rows(tmp_path, *(row(step) for step in range(1, 6)))
    (tmp_path / "samples.jsonl").write_text('{"step": 0}\n{"step": 4}\n')
    write_rows(tmp_path, row(4), last_step=3)
    assert steps(tmp_path / "metrics.csv") == [1, 2, 3, 4]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
    moved = (tmp_path / "superseded-metrics.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in moved] == ["4", "5"]
    assert (tmp_path / "samples.jsonl").read_text() == '{"step": 0}\n'
    assert (tmp_path / "superseded-samples.jsonl").read_text() == '{"step": 4}\n'


@pytest.mark.parametrize("name", ["metrics.csv", "metrics.jsonl"])
def test_a_half_written_line_is_moved_aside(tmp_path: Path, name: str) -> None:
    write_rows(tmp_path, row(1), row(2))
    path = tmp_path / name
    whole = path.read_text()
    half = whole.splitlines()[-1][:15]
    with open(path, "a") as file:
        # Cut in its loss: what is left still reads as a row, of an update that is done.
        file.write(half)
    write_rows(tmp_path, last_step=2)
    assert path.read_text() == whole
    assert (tmp_path / f"superseded-{name}").read_text() == half + "\n"


def test_nothing_is_superseded_without_need(tmp_path: Path) -> None:
    write_rows(tmp_path, row(1), row(2))
    write_rows(tmp_path, last_step=2)
    assert list(tmp_path.glob("superseded-*")) == []


def test_tensorboard_is_an_option(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, last_step=0, tensorboard=True)
    log.write(row(1))
    log.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"tok_per_s" in events.read_bytes()


@pytest.mark.parametrize("n_rows", [0, 1, 3])
def test_plot_is_a_png(tmp_path: Path, n_rows: int) -> None:
    write_rows(tmp_path, *(row(step, val_loss=2.5) for step in range(1, n_rows + 1)))
    plot_loss(tmp_path / "metrics.csv", tmp_path / "loss.png", title="run")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG\r\n")
