"""Where rows go: metrics.csv, metrics.jsonl, TensorBoard. A sink that fails never ends a run."""

import csv
import io
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from fastllama.atomic import write_atomic
from fastllama.logs.rows import COLUMNS, Row


class MetricsLog:
    """Appends rows to metrics.csv, metrics.jsonl and, if asked, TensorBoard."""

    def __init__(self, run: Path, last_step: int, tensorboard: bool) -> None:
        """Open the logs of a run that resumes after update `last_step`.

        Rows of later updates come from a process that was killed before its next checkpoint. The
        run repeats these updates. So their rows, and their bad batches and samples, move to
        superseded-metrics.csv and so on.
        """
        self._csv, self._jsonl = run / "metrics.csv", run / "metrics.jsonl"
        keep_rows_until(self._csv, last_step, lambda line: int(line.split(",")[0]), header=True)
        # A run that restarts at 0 takes its sample before the first update again.
        for log, last in (
            (self._jsonl, last_step),
            (run / "bad-updates.jsonl", last_step),
            (run / "samples.jsonl", last_step or -1),
        ):
            keep_rows_until(log, last, lambda line: int(json.loads(line)["step"]))
        if self._csv.exists():
            add_columns(self._csv)
        else:
            write_atomic(self._csv, ",".join(COLUMNS) + "\n")
        self._waiting = {self._csv: "", self._jsonl: ""}
        self._writer = None
        if tensorboard:
            # Imported here because the import takes a second.
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=last_step + 1)

    def write(self, row: Row) -> None:
        """Append a row with one write to each file. A kill leaves at most one half line.

        Raises:
            OSError: a file cannot be written now; the next row writes these lines too.
        """
        values = {name: getattr(row, name) for name in COLUMNS}
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(
            ["" if value is None else value for value in values.values()]
        )
        self._waiting[self._csv] += text.getvalue()
        self._waiting[self._jsonl] += json.dumps({k: finite(v) for k, v in values.items()}) + "\n"
        for path, lines in self._waiting.items():
            append(path, lines)
            self._waiting[path] = ""
        if self._writer is not None:
            for name, value in values.items():
                if value is not None and name not in ("step", "progress", "eta_s"):
                    self._writer.add_scalar(name, value, row.step)

    def sync(self) -> None:
        """Make the rows durable, so that a checkpoint never survives a crash without its rows."""
        for path in (self._csv, self._jsonl):
            if path.exists():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())

    def close(self) -> None:
        """Flush what TensorBoard buffers."""
        if self._writer is not None:
            self._writer.close()


def finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON lacks, by None."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def append(path: Path, text: str) -> None:
    """Append whole lines to a log file in one write, or nothing.

    Raises:
        OSError: the disk is full or read-only, or the folder is gone.
    """
    size = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
    except OSError:
        # A full disk may have taken the beginning of the lines.
        with suppress(OSError):
            os.truncate(path, size)
        raise


@contextmanager
def report_write_errors(console: Console, what: str) -> Iterator[None]:
    """Print an OSError instead of raising it: a full disk does not end a run."""
    try:
        yield
    except OSError as error:
        message = f"{what} could not be written: {error}; training continues."
        console.print(message, highlight=False, soft_wrap=True, markup=False)


def keep_rows_until(
    path: Path, last_step: int, step_of: Callable[[str], int], header: bool = False
) -> None:
    """Move lines after `last_step`, and half lines, to superseded-<name> beside the log."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = lines[:1] if header else []
    moved: list[str] = []
    for line in lines[len(kept) :]:
        try:
            keep = line.endswith("\n") and step_of(line) <= last_step
        except (ValueError, KeyError, TypeError):
            keep = False
        (kept if keep else moved).append(line)
    if moved:
        append(path.with_name(f"superseded-{path.name}"), "".join(moved).rstrip("\n") + "\n")
        write_atomic(path, "".join(kept))


def add_columns(path: Path) -> None:
    """Add the columns that an older metrics.csv lacks; its rows get empty cells."""
    header, *rows = path.read_text(encoding="utf-8").splitlines()
    missing = len(COLUMNS) - len(header.split(","))
    if missing > 0:
        lines = [",".join(COLUMNS), *(row + "," * missing for row in rows)]
        write_atomic(path, "".join(f"{line}\n" for line in lines))
