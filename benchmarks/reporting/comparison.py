"""Compare two results folders cell by cell: regressions in time, memory and correctness.

A cell is slower or faster if the ratio of its medians differs from 1 by more than 2 % and by more
than hypot(noise_old, noise_new). Noise is the interquartile range over the median. Rationale:

- The relative errors of two independent measurements add in quadrature in their ratio.
- The interquartile range of a normal distribution is 1.35 standard deviations, and the standard
  error of the median of n samples is 1.25 / sqrt(n) standard deviations. With equal noise on both
  sides the threshold is 3.4 standard errors of the ratio at n = 10, and 4.8 at n = 20. Among
  hundreds of cells hardly one is misjudged by chance.
- The samples of one run do not show the variation between runs, such as clocks, temperature and
  memory placement. The 2 % covers it, and covers runs with a single sample.

A cell measured several times in a folder is judged by the spread of its medians, which includes the
variation between runs.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.reporting.result_set import OURS, ResultSet, shape_text
from benchmarks.results import Conditions, Spread

MIN_CHANGE = 0.02
SLOWER, FASTER, EQUAL = "slower", "faster", "within noise"
Key = tuple[str, str, str, str]
"""Operator and phase (or "training"), recipe, shape, dtype."""


@dataclass(frozen=True)
class Cell:
    """Measurement of one key in one folder."""

    seconds: Spread | None
    """None if there is a `problem`."""
    peak_bytes: float | None
    problem: str
    """Exception, or reason for being void, of the newest record; empty if none."""


@dataclass(frozen=True)
class Change:
    """Times of a cell present in both folders."""

    key: Key
    old: Spread
    new: Spread

    @property
    def ratio(self) -> float:
        """New time over old."""
        return self.new.median / self.old.median

    @property
    def verdict(self) -> str:
        """SLOWER, FASTER or EQUAL."""
        return verdict(self.old, self.new)


@dataclass(frozen=True)
class Comparison:
    """Differences of a new folder from an old one."""

    changes: list[Change]
    """Slowest first."""
    more_memory: dict[Key, tuple[float, float]]
    """Old and new peak bytes of the cells where they grew by more than 2 %."""
    newly_failing: dict[str, str]
    """Errors of checks and cells that passed in the old folder."""
    only_old: list[str]
    only_new: list[str]
    versions: list[str]
    """One sentence per software version that differs."""

    def count(self, verdict: str) -> int:
        """Number of cells with this verdict."""
        return sum(change.verdict == verdict for change in self.changes)

    @property
    def summary(self) -> str:
        """Counts: `3 slower, 12 faster, 80 within noise`, plus new failures and memory growth."""
        counts = {name: self.count(name) for name in (SLOWER, FASTER, EQUAL)}
        worse = {"newly failing": len(self.newly_failing), "more memory": len(self.more_memory)}
        counts |= {name: n for name, n in worse.items() if n}
        return ", ".join(f"{n} {name}" for name, n in counts.items())

    @property
    def is_regression(self) -> bool:
        """Whether anything became worse."""
        return bool(self.count(SLOWER) or self.more_memory or self.newly_failing)


def verdict(old: Spread, new: Spread) -> str:
    """SLOWER, FASTER or EQUAL, by the rule at the top of this file."""
    change = new.median / old.median - 1
    if abs(change) <= max(MIN_CHANGE, math.hypot(old.noise, new.noise)):
        return EQUAL
    return SLOWER if change > 0 else FASTER


def combined(spreads: Sequence[Spread]) -> Spread:
    """Spread of the medians of repeated measurements; a single measurement keeps its own spread."""
    return spreads[0] if len(spreads) == 1 else Spread.of([spread.median for spread in spreads])


def compare(old: ResultSet, new: ResultSet) -> Comparison:
    """Compare fastllama's own cells and the checks of two folders.

    Raises:
        ValueError: the devices differ, or the folders share no cell and no check.
    """
    if len(_devices(old) | _devices(new)) > 1:
        raise ValueError(
            f"not comparable: {_join_names(_devices(new))} against {_join_names(_devices(old))}; "
            "compare results of one device at one power limit."
        )
    old_cells, new_cells = _cells(old), _cells(new)
    old_checks = {check.name: check for _, check in old.checks}
    new_checks = {check.name: check for _, check in new.checks}
    old_names = {*map(name_of, old_cells), *old_checks}
    new_names = {*map(name_of, new_cells), *new_checks}
    if not old_names & new_names:
        raise ValueError(
            f"{new.folder} and {old.folder} have no cell and no check in common; "
            "compare folders of the same benchmarks."
        )
    common = {key: (cell, new_cells[key]) for key, cell in old_cells.items() if key in new_cells}
    changes = [
        Change(key, was.seconds, now.seconds)
        for key, (was, now) in common.items()
        if was.seconds and now.seconds
    ]
    broken_cells = {
        name_of(key): now.problem
        for key, (was, now) in common.items()
        if now.problem and not was.problem
    }
    broken_checks = {
        name: check.detail
        for name, check in new_checks.items()
        if not check.passed and name in old_checks and old_checks[name].passed
    }
    return Comparison(
        changes=sorted(changes, key=lambda change: change.ratio, reverse=True),
        more_memory={
            key: (was.peak_bytes, now.peak_bytes)
            for key, (was, now) in common.items()
            if was.peak_bytes is not None
            and now.peak_bytes is not None
            and now.peak_bytes > (1 + MIN_CHANGE) * was.peak_bytes
        },
        newly_failing=broken_checks | broken_cells,
        only_old=sorted(old_names - new_names),
        only_new=sorted(new_names - old_names),
        versions=_differing_versions(old, new),
    )


def name_of(key: Key) -> str:
    """Key as text on one line."""
    return ", ".join(key)


def _cells(results: ResultSet) -> dict[Key, Cell]:
    records = defaultdict(list)
    for _, kernel in results.kernels:
        if kernel.provider == OURS:
            what, shape = f"{kernel.operator} {kernel.phase}", shape_text(kernel.shape)
            records[what, kernel.recipe, shape, kernel.dtype].append(
                Cell(kernel.device_s, kernel.peak_bytes, kernel.failure)
            )
    for _, run in results.training:
        if run.contender == OURS:
            shape = shape_text({"seq_len": run.seq_len, "tokens_per_update": run.tokens_per_update})
            records["training", run.recipe, shape, run.dtype].append(
                Cell(run.seconds_per_update, run.peak_bytes, run.failure or run.parity)
            )
    return {key: _merge(cells) for key, cells in records.items()}


def _merge(cells: Sequence[Cell]) -> Cell:
    """Merge the records of a key: the newest decides on failure, all successful ones on time."""
    if problem := cells[-1].problem:
        return Cell(None, None, problem)
    worked = [cell for cell in cells if not cell.problem]
    peaks = [cell.peak_bytes for cell in worked if cell.peak_bytes is not None]
    return Cell(
        combined([cell.seconds for cell in worked if cell.seconds]),
        statistics.median(peaks) if peaks else None,
        problem="",
    )


def _devices(results: ResultSet) -> set[str]:
    return {_device(conditions) for conditions in results.condition_sets}


def _device(conditions: Conditions) -> str:
    watts = conditions.power_limit_watts
    limit = "" if watts is None else f" at {watts:g} W"
    return conditions.device + limit + (" (CPU rehearsal)" if conditions.is_rehearsal else "")


def _differing_versions(old: ResultSet, new: ResultSet) -> list[str]:
    sentences = []
    for name in ("python", "torch", "triton", "cuda", "cudnn", "driver"):
        was, now = (
            _join_names(getattr(conditions, name) for conditions in results.condition_sets)
            for results in (old, new)
        )
        if was != now:
            sentences.append(f"{name} was {was}, is {now}")
    return sentences


def _join_names(versions: Iterable[str]) -> str:
    return " and ".join(sorted({version or "unknown" for version in versions}))
