"""Report sections on ceilings and kernels."""

from collections import defaultdict
from collections.abc import Sequence

from benchmarks.reporting.result_set import OURS, ResultSet, shape_text, undated
from benchmarks.reporting.text import number, one_line, plus_minus, ratio, table
from benchmarks.results import Conditions, KernelTime, Spread

N_FURTHEST = 15


def ceilings_section(results: ResultSet) -> str:
    """Table of the ceilings behind the floors."""
    if not results.ceilings:
        return ""
    rows = [
        (
            ceiling.name + results.mark(conditions),
            shape_text(ceiling.shape),
            ceiling.dtype,
            ceiling.provider,
            number(ceiling.rate.median / 1e12) + plus_minus(ceiling.rate),
            "TB/s" if ceiling.name == "copy" else "TFLOP/s",
        )
        for conditions, ceiling in results.ceilings
    ]
    headings = ("resource", "shape", "dtype", "provider", "rate", "unit")
    return "## Ceilings\n\n" + table(headings, rows, n_text=4)


def kernels_section(results: ResultSet) -> str:
    """One table per operator and phase, followed by its failures."""
    if not results.kernels:
        return ""
    ours = defaultdict(list)
    groups = defaultdict(list)
    for conditions, kernel in results.kernels:
        groups[kernel.operator, kernel.phase].append((conditions, kernel))
        if kernel.provider == OURS and kernel.device_s:
            ours[_kernel_cell(conditions, kernel)].append(kernel.device_s)
    parts = [
        "## Kernels\n\nDevice times have a cold cache. Host times run from the launch of a call "
        "until it has finished. The floor is the least time that the ceilings above allow. The "
        "error is the largest difference from float64, over the largest value."
    ]
    headings = (
        "recipe",
        "shape",
        "dtype",
        "provider",
        "timer",
        "device µs",
        "host µs",
        "achieved",
        "% of floor",
        "error",
        "peak MB",
        "ratio",
    )
    for (operator, phase), entries in groups.items():
        entries.sort(key=lambda entry: _kernel_order(*entry))
        rows = [
            _kernel_row(kernel, results.mark(conditions), ours[_kernel_cell(conditions, kernel)])
            for conditions, kernel in entries
            if kernel.device_s
        ]
        parts.append(f"### {operator}, {phase}")
        if rows:
            parts.append(table(headings, rows, n_text=5))
        failures = [
            f"- {kernel.provider}{results.mark(conditions)} failed, {kernel.recipe}, "
            f"{shape_text(kernel.shape)}, {kernel.dtype}: {one_line(kernel.failure)}"
            for conditions, kernel in entries
            if kernel.failure
        ]
        if failures:
            parts.append("\n".join(failures))
    return "\n\n".join(parts)


def _kernel_cell(conditions: Conditions, kernel: KernelTime) -> tuple[object, ...]:
    shape = shape_text(kernel.shape)
    return (
        undated(conditions),
        kernel.operator,
        kernel.phase,
        kernel.recipe,
        shape,
        kernel.dtype,
    )


def _kernel_order(conditions: Conditions, kernel: KernelTime) -> tuple[object, ...]:
    """Sort key: by cell, fastllama first within a cell, then the fastest first."""
    seconds = kernel.device_s.median if kernel.device_s else 0.0
    cell = (kernel.recipe, kernel.dtype, sorted(kernel.shape.items()))
    return (*cell, kernel.provider != OURS, seconds, conditions.date)


def _kernel_row(kernel: KernelTime, mark: str, ours: Sequence[Spread]) -> tuple[str, ...]:
    device, share = kernel.device_s, kernel.share_of_floor
    assert device is not None
    assert share is not None
    return (
        kernel.recipe,
        shape_text(kernel.shape),
        kernel.dtype,
        kernel.provider + mark,
        kernel.timer,
        number(device.median * 1e6) + plus_minus(device),
        number(kernel.host_s.median * 1e6) if kernel.host_s else "",
        _achieved(kernel, device.median),
        f"{share:.0%}",
        "" if kernel.error is None else f"{kernel.error:.1e}",
        "" if kernel.peak_bytes is None else f"{kernel.peak_bytes / 1e6:,.1f}",
        ratio(device, ours),
    )


def _achieved(kernel: KernelTime, seconds: float) -> str:
    """Achieved FLOP/s for kernels with matmuls, otherwise achieved bytes/s."""
    if kernel.flops:
        return f"{number(kernel.flops / seconds / 1e12)} TFLOP/s"
    return f"{number(kernel.bytes / seconds / 1e9)} GB/s"


def furthest_section(results: ResultSet) -> str:
    """Our kernels with the smallest share of the floor."""
    shares = [
        (kernel.share_of_floor, conditions, kernel)
        for conditions, kernel in results.kernels
        if kernel.provider == OURS and kernel.share_of_floor is not None
    ]
    if not shares:
        return ""
    shares.sort(key=lambda entry: entry[0])
    rows = [
        (
            f"{kernel.operator}, {kernel.phase}{results.mark(conditions)}",
            kernel.recipe,
            shape_text(kernel.shape),
            kernel.dtype,
            f"{share:.0%}",
            number((kernel.device_s.median - kernel.floor_s) * 1e6),
        )
        for share, conditions, kernel in shares[:N_FURTHEST]
        if kernel.device_s
    ]
    headings = ("operator", "recipe", "shape", "dtype", "% of floor", "µs above floor")
    return f"## {OURS} kernels furthest from the floor\n\n" + table(headings, rows, n_text=4)
