"""The log files of a run: appending, resuming, disk errors."""

import csv
import errno
import json
import math
import os
import resource
from pathlib import Path
from typing import Any

import pytest

import fastllama.logs.sinks as module
from fastllama.logs.plot import plot_loss
from fastllama.logs.rows import COLUMNS, Row, read_rows
from fastllama.logs.sinks import MetricsLog
from tests.logs.test_rows import row
from tests.runs import rows, train
from tests.workspace import Workspace

# Other tools rely on these first columns.
FIRST_COLUMNS = (
    "step,tokens,tokens_total,loss,perplexity,lr,grad_norm,tok_per_s,time_s,data_wait_s,"
    "skipped_steps"
)


def write_rows(run: Path, *new: Row, last_step: int = 0) -> None:
    """Log rows in a session that starts after update `last_step`."""
    log = MetricsLog(run, last_step, tensorboard=False)
    for each in new:
        log.write(each)
    log.close()


def test_first_columns_do_not_change(tmp_path: Path) -> None:
    write_rows(tmp_path)
    header = (tmp_path / "metrics.csv").read_text()
    assert header.startswith(FIRST_COLUMNS)
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


def test_older_log_gets_new_columns(tmp_path: Path) -> None:
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
def test_nonfinite_values_are_null_in_json(tmp_path: Path, loss: float) -> None:
    bad = row(1)
    bad.loss = loss
    write_rows(tmp_path, bad)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] is None
    assert read_rows(tmp_path / "metrics.csv")[0]["loss"] == pytest.approx(loss, nan_ok=True)


def test_resuming_moves_rows_of_later_updates(tmp_path: Path) -> None:
    write_rows(tmp_path, *(row(step) for step in range(1, 6)))
    (tmp_path / "samples.jsonl").write_text('{"step": 0}\n{"step": 4}\n')
    write_rows(tmp_path, row(4), last_step=3)
    assert [int(each["step"]) for each in rows(tmp_path)] == [1, 2, 3, 4]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
    moved = (tmp_path / "superseded-metrics.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in moved] == ["4", "5"]
    assert (tmp_path / "samples.jsonl").read_text() == '{"step": 0}\n'
    assert (tmp_path / "superseded-samples.jsonl").read_text() == '{"step": 4}\n'


@pytest.mark.parametrize("name", ["metrics.csv", "metrics.jsonl"])
def test_partial_line_is_moved(tmp_path: Path, name: str) -> None:
    write_rows(tmp_path, row(1), row(2))
    path = tmp_path / name
    whole = path.read_text()
    partial = whole.splitlines()[-1][:15]
    with open(path, "a") as file:
        # The line starts with the number of an update that is done, and ends inside the loss.
        file.write(partial)
    write_rows(tmp_path, last_step=2)
    assert path.read_text() == whole
    assert (tmp_path / f"superseded-{name}").read_text() == partial + "\n"


def test_resuming_after_the_last_row_moves_nothing(tmp_path: Path) -> None:
    write_rows(tmp_path, row(1), row(2))
    write_rows(tmp_path, last_step=2)
    assert list(tmp_path.glob("superseded-*")) == []


def test_tensorboard(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, last_step=0, tensorboard=True)
    log.write(row(1))
    log.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"tok_per_s" in events.read_bytes()


def test_full_disk_delays_rows(
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, original, calls = tmp_path / "run", module.append, 0

    def append(path: Path, text: str) -> None:
        nonlocal calls
        calls += path.name == "metrics.csv"
        if calls in (4, 5):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(path, text)

    monkeypatch.setattr(module, "append", append)
    train(workspace.recipe, "--run-dir", run)
    printed = capsys.readouterr().out
    for step in (4, 5):
        assert f"The row of update {step} could not be written: [Errno 28]" in printed
    assert [int(each["step"]) for each in rows(run)] == list(range(1, 11))
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 11))


def test_append_writes_the_whole_line_or_nothing(tmp_path: Path) -> None:
    log, limit = tmp_path / "log", resource.getrlimit(resource.RLIMIT_FSIZE)
    module.append(log, "first\n")
    # 10 bytes hold the first line and part of the second.
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            module.append(log, "second line\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert log.read_text() == "first\n"


def test_tensorboard_errors_do_not_stop_training(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def fail(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("add_scalar", "close"):
        monkeypatch.setattr(SummaryWriter, name, fail)
    run = tmp_path / "run"
    train(workspace.recipe, "--run-dir", run, "--logging.tensorboard", "true")
    assert len(rows(run)) == 10
