"""The log files of a run: appending, resuming, disk errors."""

import csv
import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

import fastllama.logs.log_file as log_file
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


def write_rows(run: Path, *new: Row, last_step: int = 0) -> list[str]:
    """Log rows in a session that starts after update `last_step`; return what it printed."""
    said: list[str] = []
    log = MetricsLog(run, last_step, tensorboard=False, say=said.append)
    for each in new:
        log.write(each)
    log.close()
    return said


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
    (said,) = write_rows(tmp_path, last_step=2)
    assert "1 damaged or partial line" in said
    assert path.read_text() == whole
    assert (tmp_path / f"superseded-{name}").read_text() == partial + "\n"


def test_resuming_after_the_last_row_moves_nothing(tmp_path: Path) -> None:
    write_rows(tmp_path, row(1), row(2))
    write_rows(tmp_path, last_step=2)
    assert list(tmp_path.glob("superseded-*")) == []


def damage_csv(path: Path, number: int, *change: str) -> None:
    """Replace a text of line `number` of a log, from 0."""
    lines = path.read_bytes().split(b"\n")
    assert change[0].encode() in lines[number]
    lines[number] = lines[number].replace(*(each.encode("latin-1") for each in change), 1)
    path.write_bytes(b"\n".join(lines))


DAMAGED_ROWS = {
    "bad cell": ("2.0", "2.x"),
    "extra cell": ("2.0", "2.0,7"),
    "missing cell": ("2.0,", ""),
    "NUL": ("2.0", "\0"),
    "not UTF-8": ("2.0", "\xff"),
    "infinite step": ("2,2048", "inf,2048"),
    "huge step": ("2,2048", "9" * 5000 + ",2048"),
    "huge line": ("2.0", "2" * 200_000 + ".x"),
}


@pytest.mark.parametrize("name", DAMAGED_ROWS)
def test_damaged_row_is_set_aside(tmp_path: Path, name: str) -> None:
    path = tmp_path / "metrics.csv"
    write_rows(tmp_path, *(row(step) for step in (1, 2, 3)))
    damage_csv(path, 2, *DAMAGED_ROWS[name])
    damaged = path.read_bytes().split(b"\n")[2]
    assert [int(each["step"]) for each in read_rows(path)] == [1, 3]
    (said,) = write_rows(tmp_path, row(4), last_step=3)
    assert said == f"{path}: 1 damaged or partial line is kept in superseded-metrics.csv."
    assert [int(each["step"]) for each in rows(tmp_path)] == [1, 3, 4]
    assert (tmp_path / "superseded-metrics.csv").read_bytes() == damaged + b"\n"
    assert write_rows(tmp_path, last_step=4) == []


@pytest.mark.parametrize("header", ["\n", "step,loss,notes\n", "\0\0\n", "step", "\xff\xfe\n"])
def test_csv_with_another_header_is_set_aside(tmp_path: Path, header: str) -> None:
    path = tmp_path / "metrics.csv"
    content = header.encode("latin-1")
    path.write_bytes(content)
    assert read_rows(path) == []
    (said,) = write_rows(tmp_path, row(1))
    aside = tmp_path / "passed-over-metrics.csv-1"
    assert said == f"{path} does not start with our header; it is kept as {aside.name}."
    assert aside.read_bytes() == content
    assert len(read_rows(path)) == 1


def test_empty_csv_gets_a_header(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").touch()
    assert write_rows(tmp_path, row(1)) == []
    assert len(read_rows(tmp_path / "metrics.csv")) == 1


def test_csv_saved_by_a_spreadsheet(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    write_rows(tmp_path, row(1), row(2))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert write_rows(tmp_path, row(3), last_step=2) == []
    assert [each["loss"] for each in read_rows(path)] == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("name", ["metrics", "samples", "bad-updates"])
@pytest.mark.parametrize(
    "line",
    [b"\xff", b"{", b"[1]", b'{"step": "1"}', b'{"step": 1.5}', b"\0" * 99, b"[" * 100_000, b""],
    ids=["not UTF-8", "half", "list", "text", "fraction", "NUL", "nested", "empty"],
)
def test_damaged_json_line_is_set_aside(tmp_path: Path, name: str, line: bytes) -> None:
    path = tmp_path / f"{name}.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    (said,) = write_rows(tmp_path, last_step=2)
    assert said == f"{path}: 1 damaged or partial line is kept in superseded-{name}.jsonl."
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    assert (tmp_path / f"superseded-{name}.jsonl").read_bytes().rstrip() == line


def test_log_that_is_no_regular_file_is_set_aside(tmp_path: Path) -> None:
    # A folder, a link out of the run, and a pipe that opening would wait for.
    outside = tmp_path / "outside"
    outside.write_text("mine\n")
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.csv").mkdir()
    (run / "metrics.jsonl").symlink_to(outside)
    os.mkfifo(run / "samples.jsonl")
    (run / "bad-updates.jsonl").symlink_to("nowhere")
    said = write_rows(run, row(1))
    assert sorted(sentence.split(" is not a regular file; ")[0] for sentence in said) == sorted(
        str(run / name)
        for name in ("metrics.csv", "metrics.jsonl", "samples.jsonl", "bad-updates.jsonl")
    )
    assert outside.read_text() == "mine\n"
    assert len(rows(run)) == len((run / "metrics.jsonl").read_text().splitlines()) == 1


def test_log_that_cannot_be_tidied_does_not_end_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path, row(1), row(2))
    with monkeypatch.context() as full_disk:
        full_disk.setattr(module, "write_atomic", raise_full_disk)
        said: list[str] = []
        log = MetricsLog(tmp_path, 1, tensorboard=False, say=said.append)
        log.write(row(2, loss=5.0))
    assert len(said) == 2
    assert said[0].endswith("could not be written: No space left on device; training continues.")
    log.write(row(3, loss=5.0))
    log.close()
    assert [each["loss"] for each in read_rows(tmp_path / "metrics.csv")] == [2.0, 5.0, 5.0]


def raise_full_disk(*args: Any, **options: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk_delays_rows(
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, original, calls = tmp_path / "run", log_file.append, 0

    def append(path: Path, content: bytes) -> None:
        nonlocal calls
        calls += path.name == "metrics.csv"
        # The first call writes the header.
        if calls in (5, 6):
            raise_full_disk()
        original(path, content)

    monkeypatch.setattr(log_file, "append", append)
    train(workspace.recipe, "--run-dir", run)
    printed = capsys.readouterr().out
    for name in ("metrics.csv", "metrics.jsonl"):
        full = f"{run / name} could not be written: No space left on device; training continues."
        assert printed.count(full) == 1
        assert f"{run / name} can be written again" in printed
    assert [int(each["step"]) for each in rows(run)] == list(range(1, 11))
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 11))


def test_lost_rows_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_file, "append", raise_full_disk)
    said = write_rows(tmp_path, row(1), row(2))
    for name in ("metrics.csv", "metrics.jsonl"):
        assert f"{tmp_path / name}: the last 2 rows are lost." in said


def test_deleted_log_starts_again_with_a_header(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0, tensorboard=False, say=pytest.fail)
    log.write(row(1))
    (tmp_path / "metrics.csv").unlink()
    log.write(row(2))
    assert [int(each["step"]) for each in read_rows(tmp_path / "metrics.csv")] == [2]


@pytest.mark.parametrize("error", [ImportError("no module"), OSError(errno.EROFS, "read-only")])
def test_tensorboard_that_cannot_start_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(module, "event_log", fail)
    said: list[str] = []
    log = MetricsLog(tmp_path, 0, tensorboard=True, say=said.append)
    log.write(row(1))
    log.close()
    (sentence,) = said
    assert sentence.startswith(f"TensorBoard's events in {tmp_path} could not be written: ")
    assert len(rows(tmp_path)) == 1


def test_columns_of_sources_and_sets_survive_other_sets(tmp_path: Path) -> None:
    def session(step: int, named: dict[str, float], columns: list[str]) -> None:
        new = row(step)
        new.named = named
        log = MetricsLog(tmp_path, step - 1, tensorboard=False, say=print, named=columns)
        log.write(new)
        log.close()

    session(1, {}, [])
    session(2, {"loss/a": 2.5, "val_loss/x": 3.0}, ["loss/a", "val_loss/x"])
    session(3, {"val_loss/y": 3.5}, ["val_loss/y", "loss/a"])
    with open(tmp_path / "metrics.csv", newline="") as file:
        header, *lines = csv.reader(file)
    assert header == [*COLUMNS, "val_loss/y", "loss/a", "val_loss/x"]
    assert [line[-3:] for line in lines] == [["", "", ""], ["", "2.5", "3.0"], ["3.5", "", ""]]
    assert [len(line) for line in lines] == [len(header)] * 3
    json_rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(json_rows[1])["val_loss/x"] == 3.0
    plot_loss(tmp_path / "metrics.csv", tmp_path / "loss.png", title="run")


@pytest.mark.parametrize(
    "header", ["step,loss/a", "loss/a", "step,tokens,loss/a,x", "step,a/b,a/b"]
)
def test_foreign_header_with_a_slash(tmp_path: Path, header: str) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text(f"{header}\n1,2\n")
    said = write_rows(tmp_path, row(1))
    is_ours = header == "step,loss/a"
    assert any("does not start with our header" in line for line in said) != is_ours
