"""Plots of a report: roofline, share of the floor, training speed and memory."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter
from matplotlib.typing import FillStyleType

from benchmarks.reporting.result_set import OURS, REHEARSAL, ResultSet
from benchmarks.reporting.text import number
from benchmarks.reporting.training import ABLATION, workload
from benchmarks.results import KernelTime, TrainingRun

# The colour-blind safe palette of Okabe and Ito, without its yellow, which is hard to see on white.
OUR_COLOUR = "#0072B2"
COLOURS = ("#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
FILL: dict[str, FillStyleType] = {"forward": "full", "backward": "none", "both": "left"}
GREY = "0.45"


def figures(results: ResultSet) -> dict[str, Figure]:
    """Plots by file name, for the data present."""
    kernels = [kernel for _, kernel in results.kernels if kernel.device_s]
    ours = [kernel for kernel in kernels if kernel.provider == OURS]
    # Ablations have their own table; here they would crowd out the contenders.
    runs = [
        (run, run.contender + results.mark(conditions))
        for conditions, run in results.training
        if not run.contender.startswith(ABLATION)
    ]
    colours = provider_colours(results)
    plots: dict[str, Figure] = {}
    if ours:
        plots["kernels-roofline.png"] = _roofline(results, ours)
    if kernels:
        plots["kernels-floor.png"] = _floor(kernels, colours)
    if any(run.tok_per_s for run, _ in runs):
        plots["training-throughput.png"] = _bars(runs, colours, "tokens/s", _throughput)
    if any(run.peak_bytes for run, _ in runs):
        plots["training-memory.png"] = _bars(runs, colours, "peak memory, GB", _memory)
    subjects = {
        "kernels-roofline.png": f"{OURS} kernels and the measured roofline",
        "kernels-floor.png": "share of the floor reached by each kernel",
        "training-throughput.png": "training speed",
        "training-memory.png": "training memory",
    }
    for name, figure in plots.items():
        figure.suptitle(title(results, subjects[name]), fontweight="bold")
    return plots


def title(results: ResultSet, subject: str) -> str:
    """Title with device and rehearsal label, because plots are copied out of reports."""
    devices = " and ".join(dict.fromkeys(c.device for c in results.condition_sets))
    label = f"{REHEARSAL}\n" if results.is_rehearsal else ""
    return f"{label}{devices}: {subject}"


def provider_colours(results: ResultSet) -> dict[str, str]:
    """One colour per provider or contender, shared by all plots of a report."""
    providers = {kernel.provider for _, kernel in results.kernels}
    contenders = {run.contender for _, run in results.training} - providers
    # One sequence for both, so that no plot repeats a colour before all are used.
    others = [name for name in (*sorted(providers), *sorted(contenders)) if name != OURS]
    return {OURS: OUR_COLOUR} | {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(others)}


def _roofline(results: ResultSet, kernels: Sequence[KernelTime]) -> Figure:
    """Kernels without matmuls: bytes/s. With matmuls: FLOP/s over intensity, a panel per dtype."""
    moving = [kernel for kernel in kernels if not kernel.flops]
    dtypes = sorted({kernel.dtype for kernel in kernels if kernel.flops})
    n_panels = bool(moving) + len(dtypes)
    figure = Figure(figsize=(5.5 * n_panels + 1, 6), layout="constrained")
    panels = list(figure.subplots(1, n_panels, squeeze=False)[0])
    operators = sorted({kernel.operator for kernel in kernels})
    markers = {name: MARKERS[i % len(MARKERS)] for i, name in enumerate(operators)}
    copy = best_rate(results, "copy")
    if moving:
        axes = panels.pop(0)
        for kernel in moving:
            _point(axes, kernel, kernel.bytes / 1e6, kernel.bytes / 1e12, markers)
        if copy:
            _level(axes, copy / 1e12, f"copy {number(copy / 1e12)} TB/s", "-")
        axes.set(xscale="log", yscale="log", xlabel="MB moved", ylabel="TB/s")
        _label_decades(axes)
        axes.set_title("without matmuls")
    for axes, dtype in zip(panels, dtypes, strict=True):
        with_matmuls = [kernel for kernel in kernels if kernel.flops and kernel.dtype == dtype]
        _matmul_panel(axes, results, with_matmuls, copy, markers)
        axes.set_title(f"with matmuls, {dtype}")
    handles = [
        Line2D([], [], color=OUR_COLOUR, marker=markers[name], linestyle="", label=name)
        for name in operators
    ]
    handles += [
        Line2D([], [], color=GREY, marker="o", fillstyle=FILL[phase], linestyle="", label=phase)
        for phase in FILL
        if any(kernel.phase == phase for kernel in kernels)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False)
    return figure


def _matmul_panel(
    axes: Axes,
    results: ResultSet,
    kernels: Sequence[KernelTime],
    copy: float | None,
    markers: dict[str, str],
) -> None:
    dtype = kernels[0].dtype
    matmul = best_rate(results, "matmul", dtype)
    intensities = [kernel.flops / kernel.bytes for kernel in kernels if kernel.bytes]
    if matmul and copy:
        intensities.append(matmul / copy)
    low, high = min(intensities, default=1) / 4, max(intensities, default=1) * 4
    # Attention counts no bytes besides the operands of its matmuls. Draw it at the right edge.
    edge = high * 3
    for kernel in kernels:
        x = kernel.flops / kernel.bytes if kernel.bytes else edge
        _point(axes, kernel, x, kernel.flops / 1e12, markers)
    if any(not kernel.bytes for kernel in kernels):
        axes.axvspan(high, edge * 3, color="0.94", zorder=0)
        axes.annotate(
            "matmuls\nonly", (edge, 0.02), xycoords=("data", "axes fraction"), ha="center"
        )
        high = edge * 3
    if matmul and copy:
        along = np.geomspace(low, high, 200)
        axes.plot(along, np.minimum(matmul, along * copy) / 1e12, color=GREY, label="roof")
        serial = 1 / (1 / matmul + 1 / (along * copy)) / 1e12
        axes.plot(along, serial, color=GREY, linestyle="--", label="floor (no overlap)")
        _name_level(axes, matmul / 1e12, f"matmul {number(matmul / 1e12)} TFLOP/s")
        axes.legend(loc="lower left", bbox_to_anchor=(0.3, 0), frameon=False)
    for name in ("attention forward", "attention backward"):
        if rate := best_rate(results, name, dtype):
            _level(axes, rate / 1e12, f"{name} {number(rate / 1e12)}", ":")
    axes.set(xscale="log", yscale="log", ylabel="TFLOP/s", xlim=(low, high))
    axes.set_xlabel("FLOP / byte, without the bytes of the matmul operands")
    _label_decades(axes)


def _label_decades(axes: Axes) -> None:
    """Label 1, 2 and 5 of each decade with plain numbers; show at least one decade of height."""
    bottom, top = axes.get_ylim()
    axes.set_ylim(min(bottom, top / 10) / 1.2, top * 1.2)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,.6g}")
    axes.grid(alpha=0.3)


def best_rate(results: ResultSet, name: str, dtype: str | None = None) -> float | None:
    """Highest ceiling of this name; `dtype` None means any dtype."""
    rates = [
        ceiling.rate.median
        for _, ceiling in results.ceilings
        if ceiling.name == name and dtype in (None, ceiling.dtype)
    ]
    return max(rates, default=None)


def _point(axes: Axes, kernel: KernelTime, x: float, work: float, markers: dict[str, str]) -> None:
    assert kernel.device_s is not None
    axes.plot(
        x,
        work / kernel.device_s.median,
        marker=markers[kernel.operator],
        fillstyle=FILL[kernel.phase],
        color=OUR_COLOUR,
        alpha=0.8,
        zorder=3,
    )


def _level(axes: Axes, y: float, text: str, style: str) -> None:
    axes.axhline(y, color=GREY, linestyle=style, zorder=0)
    _name_level(axes, y, text)


def _name_level(axes: Axes, y: float, text: str) -> None:
    """Label a level at its left end: drawn over the lines, under the points."""
    axes.annotate(
        text,
        (0, y),
        (4, 5),
        ("axes fraction", "data"),
        textcoords="offset points",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0},
        zorder=2.5,
    )


def _floor(kernels: Sequence[KernelTime], colours: dict[str, str]) -> Figure:
    """One row per operator and phase, one line in it per provider, one dot per shape."""
    rows = list(dict.fromkeys((kernel.operator, kernel.phase) for kernel in kernels))
    providers = [name for name in colours if any(kernel.provider == name for kernel in kernels)]
    figure = Figure(figsize=(10, 1.5 + len(rows) * (0.15 + 0.11 * len(providers))))
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    step = 0.8 / len(providers)
    for i, name in enumerate(providers):
        own = [kernel for kernel in kernels if kernel.provider == name]
        axes.plot(
            [kernel.share_of_floor for kernel in own if kernel.share_of_floor is not None],
            [rows.index((k.operator, k.phase)) - 0.4 + (i + 0.5) * step for k in own],
            linestyle="",
            marker=MARKERS[i % len(MARKERS)],
            color=colours[name],
            alpha=0.8,
            label=name,
        )
    axes.axvline(1, color=GREY)
    axes.set_yticks(range(len(rows)), [", ".join(row) for row in rows])
    axes.set_yticks([i + 0.5 for i in range(len(rows) - 1)], minor=True)
    axes.grid(axis="y", which="minor", alpha=0.3)
    axes.grid(axis="x", alpha=0.3)
    axes.tick_params(axis="y", which="both", length=0)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.set_xlabel("floor / time; 100 % is the fastest the device allows")
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    return figure


Draw = Callable[[Axes, int, TrainingRun, dict[str, Any]], None]


def _bars(
    runs: Sequence[tuple[TrainingRun, str]], colours: dict[str, str], unit: str, draw: Draw
) -> Figure:
    """One panel per workload, one bar per contender, the fastest first in every plot."""
    workloads = list(dict.fromkeys(workload(run) for run, _ in runs))
    heights = [1 + sum(workload(run) == name for run, _ in runs) for name in workloads]
    figure = Figure(figsize=(10, 1.2 + 0.45 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(workloads), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, name in zip(panels, workloads, strict=True):
        entries = [entry for entry in runs if workload(entry[0]) == name]
        entries.sort(key=lambda entry: entry[0].tok_per_s or 0, reverse=True)
        for position, (run, _) in enumerate(entries):
            style: dict[str, Any] = {"color": colours[run.contender]}
            if run.parity:
                style = {"facecolor": "none", "edgecolor": colours[run.contender], "hatch": "///"}
            if run.failure:
                axes.annotate(" failed", (0, position), va="center", color=GREY)
            else:
                draw(axes, position, run, style)
        names = [label + (" (void)" if run.parity else "") for run, label in entries]
        axes.set_yticks(range(len(entries)), names)
        axes.set_ylim(len(entries) - 0.5, -0.5)
        axes.set_title(name, fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.15)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    panels[-1].set_xlabel(unit)
    return figure


def _throughput(axes: Axes, position: int, run: TrainingRun, style: dict[str, Any]) -> None:
    assert run.seconds_per_update is not None
    rate = run.seconds_per_update.map(lambda seconds: run.tokens_per_update / seconds)
    whiskers = [[rate.median - rate.low], [rate.high - rate.median]]
    axes.barh(position, rate.median, xerr=whiskers, ecolor="black", capsize=3, **style)
    axes.annotate(
        f"{number(rate.median)}", (rate.high, position), (6, 0), textcoords="offset points"
    ).set_verticalalignment("center")
    if run.bound_tok_per_s and not any(line.get_label() == "H" for line in axes.get_lines()):
        axes.axvline(run.bound_tok_per_s, color=GREY, linestyle="--", label="H")
        axes.annotate(
            f" H {number(run.bound_tok_per_s)}",
            (run.bound_tok_per_s, 0.02),
            xycoords=("data", "axes fraction"),
        )


def _memory(axes: Axes, position: int, run: TrainingRun, style: dict[str, Any]) -> None:
    if run.peak_bytes is None:
        return
    peak = run.peak_bytes / 1e9
    axes.barh(position, peak, **style)
    axes.annotate(f"{peak:.1f}", (peak, position), (6, 0), textcoords="offset points", va="center")
