"""Where rows go: metrics.csv, metrics.jsonl, TensorBoard. A sink that fails never ends a run."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from fastllama.atomic import set_aside, write_atomic
from fastllama.errors import reason
from fastllama.logs.log_file import LogFile, Say, keep_lines, old_lines
from fastllama.logs.rows import COLUMNS, Row, columns_of, csv_line, json_line, parse_row
from fastllama.logs.tensorboard import event_log
from fastllama.typed_json import parse_json

MAX_HEADER_BYTES = 2**16
"""Longest first line of a metrics.csv that is read as a header."""


@dataclass
class LoggedStep:
    """The field that every line of our JSON Lines has."""

    step: int


@contextmanager
def report_write_errors(console: Console, what: str) -> Iterator[None]:
    """Print an error instead of raising it: a full disk or a faulty library does not end a run."""
    with Guard(what, console.print)():
        yield


class Guard:
    """Runs work that may fail without ending the run, such as the writes of one sink.

    It prints the first failure of a series, and the end of the series.
    """

    def __init__(self, what: str, say: Say) -> None:
        """`what` is the subject of the sentences that `say` prints."""
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
                self._say(
                    f"{self._what} could not be written: {reason(error)}; training continues."
                )
        else:
            if self._n_failed:
                self._say(f"{self._what} can be written again; failures: {self._n_failed}.")
            self._n_failed = 0


@dataclass(frozen=True)
class Sink:
    """A log file of rows."""

    log: LogFile
    encode: Callable[[Row], bytes]
    guard: Guard


class MetricsLog:
    """Appends rows to metrics.csv, metrics.jsonl and, if asked, TensorBoard.

    Its methods print errors instead of raising them.
    """

    def __init__(
        self,
        run: Path,
        last_step: int,
        tensorboard: bool,
        say: Say,
        named: Sequence[str] = (),
    ) -> None:
        """Open the logs of a run that resumes after update `last_step`; `say` prints a sentence.

        `named` are the columns of several sources and validation sets.

        Rows of later updates come from a process that was killed before its next checkpoint. The
        run repeats these updates, so their rows, skipped batches and samples move to
        superseded-metrics.csv and so on.
        """
        self._say = say
        csv, jsonl = run / "metrics.csv", run / "metrics.jsonl"
        # The sets of an earlier session keep their columns.
        columns = list(dict.fromkeys([*COLUMNS, *named, *_old_columns(csv)]))
        csv_log = LogFile(csv, _header(columns), lambda: tidy_csv(csv, last_step, say, columns))
        jsonl_log = LogFile(jsonl, tidy=lambda: tidy_jsonl(jsonl, last_step, say))
        self._sinks = [
            Sink(csv_log, partial(csv_line, columns=columns), Guard(str(csv), say)),
            Sink(jsonl_log, json_line, Guard(str(jsonl), say)),
        ]
        if tensorboard:
            guard = Guard(f"TensorBoard's events in {run}", say)
            with guard():
                self._sinks.append(Sink(*event_log(run / "tensorboard", last_step), guard))
        for sink in self._sinks:
            with sink.guard():
                sink.log.flush()
        # A run that restarts at 0 takes its sample before the first update again.
        for name, last in (("bad-updates", last_step), ("samples", last_step or -1)):
            with Guard(f"{run / name}.jsonl", say)():
                tidy_jsonl(run / f"{name}.jsonl", last, say)

    def write(self, row: Row) -> None:
        """Append a row to every sink. A row that cannot be written now waits for the next."""
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
            if sink.log.n_waiting:
                with sink.guard():
                    sink.log.flush()
            if n_lost := sink.log.n_waiting:
                self._say(f"{sink.log.path}: the last {n_lost} rows are lost.")


def _header(columns: Sequence[str]) -> bytes:
    return (",".join(columns) + "\n").encode()


def _old_columns(path: Path) -> list[str]:
    """The columns of an earlier session's metrics.csv, if it can be read."""
    # `tidy_csv` reports a file that cannot be read, or is no regular file.
    with suppress(OSError):
        if path.is_file():
            with open(path, "rb") as file:
                return columns_of(file.readline(MAX_HEADER_BYTES))
    return []


def tidy_csv(path: Path, last_step: int, say: Say, new_columns: Sequence[str] = COLUMNS) -> None:
    """Keep the rows of a metrics.csv up to update `last_step`, and give them the new columns.

    A file without our header is renamed, and `say` is told.

    Raises:
        OSError: the file cannot be read or replaced.
    """
    header, *lines = old_lines(path, say) or [b""]
    if not header:
        return
    columns = columns_of(header)
    if not columns:
        say(f"{path} does not start with our header; it is kept as {set_aside(path).name}.")
        return
    kept = keep_lines(
        path, lines, last_step, lambda line: int(parse_row(line, columns)["step"]), say
    )
    changed = columns != list(new_columns)
    if changed:
        kept = [_with_columns(line, columns, new_columns) for line in kept]
    if changed or len(kept) < len(lines):
        write_atomic(path, _header(new_columns) + b"".join(kept))


def _with_columns(line: bytes, columns: Sequence[str], new_columns: Sequence[str]) -> bytes:
    cells = dict(zip(columns, line.rstrip(b"\r\n").split(b","), strict=True))
    return b",".join(cells.get(column, b"") for column in new_columns) + b"\n"


def tidy_jsonl(path: Path, last_step: int, say: Say) -> None:
    """Keep the lines of a JSON Lines log up to update `last_step`.

    Raises:
        OSError: the file cannot be read or replaced.
    """
    lines = old_lines(path, say)
    kept = keep_lines(
        path, lines, last_step, lambda line: parse_json(line, LoggedStep, str(path)).step, say
    )
    if len(kept) < len(lines):
        write_atomic(path, b"".join(kept))
