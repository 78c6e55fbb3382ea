"""The log files of a run: appending, resuming, the plot."""

import csv
import json
import math
from pathlib import Path

import pytest

from fastllama.logs.plot import plot_loss
from fastllama.logs.rows import COLUMNS, Row, read_rows
from fastllama.logs.sinks import MetricsLog
from tests.logs.test_rows import row

HEADER = (
    "step,tokens,tokens_total,loss,perplexity,lr,grad_norm,tok_per_s,time_s,data_wait_s,"
    "skipped_steps"
)


def write_rows(run: Path, *rows: Row, last_step: int = 0) -> None:
    log = MetricsLog(run, last_step, tensorboard=False)
    for each in rows:
        log.write(each)
    log.close()


def steps(path: Path) -> list[int]:
    return [int(each["step"]) for each in read_rows(path)]


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
