"""The logs of a run on disk: appended to, read back, drawn."""

import csv
import io
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from fastllama.atomic import write_atomic
from fastllama.logs.rows import COLUMNS, Row


class MetricsLog:
    """Appends rows to metrics.csv, metrics.jsonl and, where wanted, TensorBoard."""

    def __init__(self, run: Path, last_step: int, tensorboard: bool) -> None:
        """Open the logs of a run that goes on after `last_step`.

        Rows of later updates come from a process that was killed before its next checkpoint. Those
        updates are about to be done again, so their rows, and the bad batches and samples between
        them, move to superseded-metrics.csv and so on.
        """
        self._csv, self._jsonl = run / "metrics.csv", run / "metrics.jsonl"
        keep_rows_until(self._csv, last_step, lambda line: int(line.split(",")[0]), header=True)
        # A run that starts again at 0 samples before its first update again.
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
            # Imported here because it takes a second, for those who turned it off.
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=last_step + 1)

    def write(self, row: Row) -> None:
        """Append a row, one write a file, so that a killed process leaves at most one half line.

        Raises:
            OSError: a file cannot be written now; its lines go out with the next row.
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
        """Make the rows durable, so that no checkpoint outlives the rows before it."""
        for path in (self._csv, self._jsonl):
            if path.exists():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())

    def close(self) -> None:
        """Flush what TensorBoard buffers."""
        if self._writer is not None:
            self._writer.close()


def finite(value: Any) -> Any:
    """JSON has no NaN or infinity; they become null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def append(path: Path, text: str) -> None:
    """Add whole lines to a log file in one write, or none of them.

    Raises:
        OSError: the disk is full or read-only, or the folder is gone.
    """
    size = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
    except OSError:
        # A disk that is full may have taken the beginning.
        with suppress(OSError):
            os.truncate(path, size)
        raise


@contextmanager
def outlived(console: Console, what: str) -> Iterator[None]:
    """Tell of an OSError inside instead of raising it: a run outlives a disk that is full."""
    try:
        yield
    except OSError as error:
        message = f"{what} could not be written: {error}; training goes on."
        console.print(message, highlight=False, soft_wrap=True, markup=False)


def keep_rows_until(
    path: Path, last_step: int, step_of: Callable[[str], int], header: bool = False
) -> None:
    """Move the lines of a log after `last_step`, or cut short, to superseded-<name> beside it."""
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
    """Give a metrics.csv from before some of the last columns those it lacks, empty in its rows."""
    header, *rows = path.read_text(encoding="utf-8").splitlines()
    missing = len(COLUMNS) - len(header.split(","))
    if missing > 0:
        lines = [",".join(COLUMNS), *(row + "," * missing for row in rows)]
        write_atomic(path, "".join(f"{line}\n" for line in lines))


def read_rows(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.csv as numbers; empty cells are left out."""
    with open(path, newline="", encoding="utf-8") as file:
        return [
            {name: float(value) for name, value in row.items() if value}
            for row in csv.DictReader(file)
        ]


def plot_loss(metrics_csv: Path, output: Path, title: str) -> None:
    """Draw loss, validation loss and learning rate over tokens as a PNG."""
    rows = read_rows(metrics_csv)
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["tokens_total"] for row in rows], [row["loss"] for row in rows], label="loss")
    validated = [row for row in rows if "val_loss" in row]
    if validated:
        axes.plot(
            [row["tokens_total"] for row in validated],
            [row["val_loss"] for row in validated],
            "o-",
            label="validation loss",
        )
    axes.set(xlabel="tokens", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    rate = axes.twinx()
    rate.plot(
        [row["tokens_total"] for row in rows],
        [row["lr"] for row in rows],
        color="gray",
        linestyle=":",
        label="learning rate",
    )
    rate.set_ylabel("learning rate")
    rate.set_ylim(bottom=0)
    lines = axes.get_lines() + rate.get_lines()
    axes.legend(lines, [str(line.get_label()) for line in lines], loc="upper right")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomic(output, buffer.getvalue())
