"""Two folders of results, cell by cell: what became slower, heavier, or stopped working.

A cell is slower or faster where the ratio of the medians is off 1 by more than 2 % and by more than
the root of the sum of the squares of both noises, the noise being the width of the middle half over
the median. Why this much:

- Relative errors of two independent measurements add up in squares in their ratio.
- The middle half of a normal distribution is 1.35 standard deviations wide, and the median of n
  samples is uncertain by 1.25 / sqrt(n) of one. So two equal noises ask for 3.4 standard errors of
  the ratio at n = 10 and 4.8 at n = 20: among hundreds of cells hardly one is called by chance.
- The samples of one run do not show what differs between runs, such as clocks, temperature, and
  where buffers lie in memory. The 2 % stands for that, and for runs of a single sample.

A cell measured several times in a folder counts with the median of its medians and their spread,
which does show what differs between runs.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.reporting.result_set import OURS, ResultSet, shape_text
from benchmarks.results import Conditions, Spread

LEAST_CHANGE = 0.02
SLOWER, FASTER, EQUAL = "slower", "faster", "no difference beyond noise"
Key = tuple[str, str, str, str]
"""What was measured, recipe, shape, type."""


@dataclass(frozen=True)
class Cell:
    """What one folder knows of one key."""

    seconds: Spread | None
    """None where `problem` says why."""
    peak_bytes: float | None
    problem: str
    """Of the newest record: what was raised, or why it is void."""


@dataclass(frozen=True)
class Change:
    """A cell that both folders have."""

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
    """What a new folder changed over an old one."""

    changes: list[Change]
    """Slowest first."""
    heavier: dict[Key, tuple[float, float]]
    """Peak bytes, old and new, of the cells where they grew by more than 2 %."""
    newly_failing: dict[str, str]
    """Checks and cells that worked before, with what went wrong."""
    only_old: list[str]
    only_new: list[str]
    versions: list[str]
    """Software that differs, as sentences."""

    def count(self, verdict: str) -> int:
        """Cells with this verdict."""
        return sum(change.verdict == verdict for change in self.changes)

    @property
    def summary(self) -> str:
        """`3 slower, 12 faster, 80 no difference beyond noise`, and what else became worse."""
        counts = {name: self.count(name) for name in (SLOWER, FASTER, EQUAL)}
        worse = {"newly failing": len(self.newly_failing), "more memory": len(self.heavier)}
        counts |= {name: n for name, n in worse.items() if n}
        return ", ".join(f"{n} {name}" for name, n in counts.items())

    @property
    def is_regression(self) -> bool:
        """Whether anything became worse."""
        return bool(self.count(SLOWER) or self.heavier or self.newly_failing)


def verdict(old: Spread, new: Spread) -> str:
    """Whether times differ, by the rule at the top of this file."""
    change = new.median / old.median - 1
    if abs(change) <= max(LEAST_CHANGE, math.hypot(old.noise, new.noise)):
        return EQUAL
    return SLOWER if change > 0 else FASTER


def combined(spreads: Sequence[Spread]) -> Spread:
    """One spread of repeated measurements; that of a single one is its own."""
    return spreads[0] if len(spreads) == 1 else Spread.of([spread.median for spread in spreads])


def compare(old: ResultSet, new: ResultSet) -> Comparison:
    """Compare fastllama's own cells, and the checks.

    Raises:
        ValueError: the devices differ, or the folders have nothing in common.
    """
    if len(_devices(old) | _devices(new)) > 1:
        raise ValueError(
            f"not comparable: {_listed(_devices(new))} against {_listed(_devices(old))}; "
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
        heavier={
            key: (was.peak_bytes, now.peak_bytes)
            for key, (was, now) in common.items()
            if was.peak_bytes is not None
            and now.peak_bytes is not None
            and now.peak_bytes > (1 + LEAST_CHANGE) * was.peak_bytes
        },
        newly_failing=broken_checks | broken_cells,
        only_old=sorted(old_names - new_names),
        only_new=sorted(new_names - old_names),
        versions=_differing_versions(old, new),
    )


def name_of(key: Key) -> str:
    """A key on one line."""
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
    return {key: _together(cells) for key, cells in records.items()}


def _together(cells: Sequence[Cell]) -> Cell:
    """Of one key: the newest record decides whether it works, all that worked say how fast."""
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
            _listed(getattr(conditions, name) for conditions in results.condition_sets)
            for results in (old, new)
        )
        if was != now:
            sentences.append(f"{name} was {was}, is {now}")
    return sentences


def _listed(versions: Iterable[str]) -> str:
    return " and ".join(sorted({version or "unknown" for version in versions}))
