"""Terminal table of measured kernels."""

from collections.abc import Iterable

from rich.table import Table

from benchmarks.results import Conditions, KernelTime

REHEARSAL = "CPU rehearsal: tests the benchmark code, does not measure speed"


def kernel_table(rows: Iterable[KernelTime], conditions: Conditions) -> Table:
    """One row per cell: device time, share of the floor, error."""
    title = REHEARSAL if conditions.is_rehearsal else conditions.device
    table = Table(title=title, caption="spread: half the interquartile range")
    for heading in ("operator", "phase", "recipe", "dtype", "provider"):
        table.add_column(heading)
    for heading in ("device µs", "spread", "host µs", "% of floor", "error", "peak MB"):
        table.add_column(heading, justify="right")
    for row in rows:
        cells = [row.operator, row.phase, row.recipe, row.dtype, row.provider]
        if row.device_s is None or row.host_s is None:
            table.add_row(*cells, row.failure)
            continue
        table.add_row(
            *cells,
            f"{row.device_s.median * 1e6:,.1f}",
            f"{row.device_s.noise / 2:.1%}",
            f"{row.host_s.median * 1e6:,.1f}",
            f"{row.share_of_floor:.0%}",
            f"{row.error:.1e}",
            "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:,.0f}",
        )
    return table
