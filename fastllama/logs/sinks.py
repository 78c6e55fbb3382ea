"""Where rows go: metrics.csv, metrics.jsonl, TensorBoard. A sink that fails never ends a run."""

import io
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from fastllama.errors import reason
from fastllama.logs.log_file import LogFile, Say, append, keep_lines
from fastllama.logs.rows import COLUMNS, Row, add_columns, columns_of, step_of_row
from fastllama.typed_json import parse_json


@dataclass
class LoggedStep:
    """The field that every line of our JSON Lines has."""

    step: int


class Guard:
    """Runs work that may fail without ending the run, such as the writes of one sink.

    The first failure of a series is printed, and so is the end of the series.
    """

    def __init__(self, what: str, say: Say) -> None:
        """`what` is the subject of the printed sentences."""
        self._what, self._say = what, say
        self._n_failed = 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Print an error of the work inside instead of raising it."""
        try:
            yield
        except Exception as error:
            self._n_failed += 1
            if self._n_failed == 1:
                self._say(f"{self._what} could not be written: {reason(error)}; training continues.")
        else:
            if self._n_failed:
                self._say(f"{self._what} is written again, after {self._n_failed} failures.")
            self._n_failed = 0


@dataclass
class Sink:
    """A log file of rows."""

    log: LogFile
    encode: Callable[[Row], bytes]
    guard: Guard


class MetricsLog:
    """Appends rows to metrics.csv, metrics.jsonl and, if asked, TensorBoard. Never raises."""

    def __init__(self, run: Path, last_step: int, tensorboard: bool, say: Say) -> None:
        """Open the logs of a run that resumes after update `last_step`; `say` prints a sentence.

        Rows of later updates come from a process that was killed before its next checkpoint. The
        run repeats these updates, so their rows, skipped batches and samples move to
        superseded-metrics.csv and so on.
        """
        self._say = say
        csv, jsonl = run / "metrics.csv", run / "metrics.jsonl"

        def tidy_csv() -> None:
            keep_lines(csv, last_step, step_of_row, say, is_header=lambda line: bool(columns_of(line)))
            add_columns(csv)

        def tidy_lines(path: Path, last: int = last_step) -> None:
            keep_lines(path, last, step_of_line, say)

        header = (",".join(COLUMNS) + "\n").encode()
        self._sinks = [
            Sink(LogFile(csv, header, tidy_csv), csv_line, Guard(str(csv), say)),
            Sink(LogFile(jsonl, tidy=lambda: tidy_lines(jsonl)), json_line, Guard(str(jsonl), say)),
        ]
        if tensorboard:
            with Guard(f"TensorBoard's events in {run}", say)():
                self._sinks.append(tensorboard_sink(run / "tensorboard", last_step, say))
        for sink in self._sinks:
            with sink.guard():
                sink.log.flush()
        # A run that restarts at 0 takes its sample before the first update again.
        for path, last in ((run / "bad-updates.jsonl", last_step), (run / "samples.jsonl", last_step or -1)):
            with Guard(str(path), say)():
                tidy_lines(path, last)

    def write(self, row: Row) -> None:
        """Append a row to each sink, with one write. A kill leaves at most one partial line.

        A row that cannot be written now is written with the next one.
        """
        for sink in self._sinks:
            with sink.guard():
                sink.log.write(sink.encode(row))

    def sync(self) -> None:
        """Make the rows durable, so that a checkpoint never survives a crash without its rows."""
        for sink in self._sinks:
            with sink.guard():
                sink.log.sync()

    def close(self) -> None:
        """Try once more to write the rows that wait, and say how many are lost."""
        for sink in self._sinks:
            with sink.guard():
                sink.log.flush()
            if n_lost := sink.log.n_waiting:
                self._say(f"{sink.log.path}: {n_lost} rows are lost.")
