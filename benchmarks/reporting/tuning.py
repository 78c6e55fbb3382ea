"""Report section on tuned kernel configurations."""

from benchmarks.reporting.result_set import ResultSet, undated
from benchmarks.reporting.text import number, table
from benchmarks.results import Conditions, Spread, Tuning

HEADINGS = (
    "configuration",
    "recipe",
    "pinned",
    "found",
    "verdict",
    "pinned µs",
    "% of floor",
    "found µs",
    "gain",
)
MIN_GAIN = 0.01
"""Least relative gain that justifies a new configuration."""


def is_faster(new: Spread, old: Spread) -> bool:
    """Faster by more than `MIN_GAIN`, with disjoint interquartile ranges."""
    return new.median < (1 - MIN_GAIN) * old.median and new.high < old.low


def verdict(was: Tuning, found: Tuning) -> str:
    """Whether to keep the pinned configuration or to pin the found one."""
    if was.device_s is None or found.device_s is None:
        return f"the pinned configuration fails: {was.failure}"
    if found.config == was.config:
        return "keep"
    return "pin" if is_faster(found.device_s, was.device_s) else "keep: no gain when measured again"


def cells(was: Tuning, found: Tuning) -> tuple[str, ...]:
    """Cells of one row under HEADINGS."""
    changed = {name: value for name, value in found.config.items() if value != was.config[name]}
    times = [""] * 4
    if was.device_s is not None and found.device_s is not None:
        before, after = was.device_s.median, found.device_s.median
        times = [
            number(before * 1e6),
            f"{was.floor_s / before:.0%}",
            number(after * 1e6),
            f"{before / after - 1:+.1%}",
        ]
    options = (_options(config) for config in (was.config, changed))
    return (was.name, was.recipe, *options, verdict(was, found), *times)


def _options(config: dict[str, int]) -> str:
    return ", ".join(f"{name} {value:,}" for name, value in config.items())


def tuning_section(results: ResultSet) -> str:
    """One row per kernel and recipe, from the latest search."""
    searched: dict[tuple[Conditions, str, str], tuple[Conditions, Tuning, Tuning]] = {}
    for conditions, row in results.tuning:
        key = (undated(conditions), row.name, row.recipe)
        if row.role == "pinned":
            searched[key] = (conditions, row, row)
        elif row.role == "found":
            searched[key] = (conditions, searched[key][1], row)
    if not searched:
        return ""
    rows = []
    for conditions, was, found in searched.values():
        name, *others = cells(was, found)
        rows.append((name + results.mark(conditions), *others))
    return "## Kernel configurations\n\n" + table(HEADINGS, rows, n_text=5)
