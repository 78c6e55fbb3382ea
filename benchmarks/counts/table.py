"""The table of the counts."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.counts.budget import Count
from benchmarks.counts.compiled import ARCHITECTURES

TABLE_ARCHITECTURE = 90
HEADINGS = (
    "launch",
    "bytes / floor",
    "instructions / KiB",
    "registers",
    "warps / SM",
    "KiB in flight / SM",
    "of L2 read twice",
)
CAPTION = (
    f"sm_{TABLE_ARCHITECTURE}; in brackets the most on "
    f"{', '.join(f'sm_{architecture}' for architecture in ARCHITECTURES)}, where it is more"
)


def rows(counts: Iterable[Count]) -> list[tuple[str, ...]]:
    """Cells of the table, a row for each launch."""
    launches: dict[str, dict[int, Count]] = defaultdict(dict)
    for found in counts:
        launches[found.label][found.architecture] = found
    return [_row(label, launches[label]) for label in sorted(launches)]


def _row(label: str, by_architecture: dict[int, Count]) -> tuple[str, ...]:
    shown, every = by_architecture[TABLE_ARCHITECTURE], by_architecture.values()
    return (
        label,
        "" if math.isnan(shown.moved) else _with_most(shown.moved, [f.moved for f in every], ".3f"),
        _with_most(shown.instructions, [found.instructions for found in every], ".0f"),
        _with_most(shown.registers, [found.registers for found in every], "d"),
        f"{shown.warps}" + (f", spills {shown.spilled} bytes" if shown.spilled else ""),
        f"{shown.in_flight:.0f}",
        _with_most(shown.cached, [found.cached for found in every], ".0%") if shown.cached else "",
    )


def _with_most(value: float, values: Sequence[float], form: str) -> str:
    most = format(max(values), form)
    return format(value, form) + (f" ({most})" if most != format(value, form) else "")


def print_markdown(cells: Iterable[Sequence[str]]) -> None:
    """Print the table for a page."""
    alignment = [":--"] + ["--:"] * (len(HEADINGS) - 1)
    for row in (HEADINGS, alignment, *cells):
        print("| " + " | ".join(row) + " |")


def print_table(cells: Iterable[Sequence[str]]) -> None:
    """Print the table for a terminal."""
    table = Table(caption=CAPTION)
    for number, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if number else "left")
    for row in cells:
        table.add_row(*row)
    Console(width=130).print(table)
