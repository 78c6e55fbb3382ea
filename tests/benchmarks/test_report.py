"""Reports, plots, and the regression gate."""

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.colors import to_hex

from benchmarks import report
from benchmarks.reporting.comparison import EQUAL, FASTER, SLOWER, compare, verdict
from benchmarks.reporting.plots import figures
from benchmarks.reporting.result_set import REHEARSAL, ResultSet
from benchmarks.results import (
    RESULTS,
    Ceiling,
    Check,
    Conditions,
    KernelTime,
    ProfileShare,
    Record,
    Spread,
    TrainingRun,
    append,
    read,
)

GPU = Conditions(
    "2026-11-22T10:00:00+00:00", "abc1234", "NVIDIA H200", False, 132, 141 * 10**9,
    "3.11.9", "2.13.0", "3.6.0", "12.8", "91002", "570.1", 700.0, 1980.0,
)  # fmt: skip
CPU = replace(GPU, device="Intel Xeon", is_rehearsal=True, driver="", power_limit_watts=None)
KERNEL = KernelTime(
    "rms_norm", "forward", "llama-1b", {"M": 16384, "N": 2048}, "bfloat16", "fastllama", "graph",
    device_s=Spread(100e-6, 99e-6, 101e-6, 20), host_s=Spread(130e-6, 129e-6, 131e-6, 20),
    peak_bytes=10**8, error=1e-3, bytes=2e8, flops=0.0, floor_s=50e-6,
)  # fmt: skip
RUN = TrainingRun(
    "fastllama", "llama-1b", "bfloat16", 2048, 16, 10**6, 10**9, Spread(10.0, 9.9, 10.1, 20),
    tok_per_s=1e5, mfu_causal=0.41, mfu_palm=0.45, hfu=0.48, bound_tok_per_s=2e5,
    bound_source="measured here", peak_bytes=60 * 10**9, seconds_to_first_update=31.0,
    losses=[11.0, 7.5],
)  # fmt: skip
CEILINGS = [
    Ceiling("copy", "pytorch", {"bytes": 2**32}, "uint8", Spread(4e12, 3.9e12, 4.1e12, 9)),
    Ceiling("matmul", "pytorch", {"M": 8192}, "bfloat16", Spread(8e14, 7e14, 8.1e14, 9)),
]


def kernel(seconds: float, provider: str = "fastllama", noise: float = 0.0) -> KernelTime:
    return replace(KERNEL, provider=provider, device_s=spread(seconds, noise))


def run(contender: str, seconds: float, noise: float = 0.0, parity: str = "") -> TrainingRun:
    spread_ = spread(seconds, noise)
    return replace(
        RUN, contender=contender, seconds_per_update=spread_, tok_per_s=1e6 / seconds, parity=parity
    )


def spread(median: float, noise: float) -> Spread:
    return Spread(median, median * (1 - noise / 2), median * (1 + noise / 2), 20)


def results(folder: Path, *records: Record, conditions: Conditions = GPU) -> ResultSet:
    append(folder, conditions, records)
    return ResultSet.load(folder)


def rows(results: ResultSet, *words: str) -> list[list[str]]:
    """Cells of the report's table rows that contain all of `words`."""
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in report.markdown(results, []).splitlines()
        if line.startswith("|") and all(word in line for word in words)
    ]


def call(monkeypatch: pytest.MonkeyPatch, *arguments: Path | str) -> int:
    """Run the command and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
    try:
        report.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def gate(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, old: Sequence[Record], new: Sequence[Record]
) -> int:
    append(tmp_path / "old", GPU, old)
    append(tmp_path / "new", GPU, new)
    return call(monkeypatch, tmp_path / "new", "--baseline", tmp_path / "old")


def test_writes_report_and_plots_next_to_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_matmul = replace(KERNEL, operator="swiglu_linear", flops=1e9)
    attention = replace(KERNEL, operator="attention", phase="backward", bytes=0.0, flops=1e9)
    results(tmp_path, *CEILINGS, KERNEL, with_matmul, attention, RUN)
    assert call(monkeypatch, tmp_path) == 0
    written = {
        "report.md",
        "kernels-roofline.png",
        "kernels-floor.png",
        "training-throughput.png",
        "training-memory.png",
    }
    assert {Path(line).name for line in capsys.readouterr().out.splitlines()} == written
    assert {file.name for file in tmp_path.iterdir() if file.suffix != ".json"} == written
    for name in written - {"report.md"}:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert f"({name})" in (tmp_path / "report.md").read_text()


def test_reports_all_result_folders_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = Check("finite", True, "")
    results(tmp_path / "h200", check)
    results(tmp_path / "h100", check)
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert call(monkeypatch) == 0
    assert {file.parent.name for file in tmp_path.glob("*/report.md")} == {"h200", "h100"}
    assert call(monkeypatch, tmp_path / "h200", "--out", tmp_path / "elsewhere") == 0
    assert (tmp_path / "elsewhere" / "report.md").exists()


def test_no_plots_without_data(tmp_path: Path) -> None:
    failed = replace(RUN, seconds_per_update=None, tok_per_s=None, peak_bytes=None, failure="OOM")
    ablation = replace(RUN, contender="fastllama without rope")
    peer = replace(KERNEL, provider="peer")
    assert figures(results(tmp_path / "none", *CEILINGS, failed, ablation)) == {}
    assert set(figures(results(tmp_path / "peer", peer))) == {"kernels-floor.png"}
    no_memory = replace(RUN, peak_bytes=None)
    assert set(figures(results(tmp_path / "cpu", no_memory))) == {"training-throughput.png"}


@pytest.mark.parametrize("other_conditions", [[], [GPU]])
def test_rehearsal_is_labelled(tmp_path: Path, other_conditions: list[Conditions]) -> None:
    for conditions in (*other_conditions, CPU):
        folder = results(tmp_path, *CEILINGS, KERNEL, RUN, conditions=conditions)
    assert report.markdown(folder, []).startswith(f"**{REHEARSAL}**\n")
    plots = figures(folder)
    assert len(plots) == 4
    assert all(figure.get_suptitle().startswith(REHEARSAL) for figure in plots.values())


def test_measurement_has_no_rehearsal_label(tmp_path: Path) -> None:
    folder = results(tmp_path, *CEILINGS, KERNEL, RUN)
    assert report.markdown(folder, []).startswith("# NVIDIA H200\n")
    for figure in figures(folder).values():
        assert figure.get_suptitle().startswith("NVIDIA H200: ")


def test_conditions_are_listed_and_marked(tmp_path: Path) -> None:
    folder = results(tmp_path, KERNEL)
    text = report.markdown(folder, [])
    for fact in ("torch 2.13.0", "triton 3.6.0", "CUDA 12.8", "driver 570.1", "700 W", "1,980 MHz"):
        assert fact in text
    assert "commit abc1234" in text
    later = replace(GPU, date="2026-11-23T10:00:00+00:00")
    folder = results(tmp_path, KERNEL, conditions=later)
    assert "2026-11-22 to 2026-11-23" in report.markdown(folder, [])
    assert "[A]" not in report.markdown(folder, [])
    folder = results(tmp_path, KERNEL, conditions=replace(later, torch="2.14.0"))
    text = report.markdown(folder, [])
    assert "different conditions" in text
    marked = {row[3] for row in rows(folder, "| graph |")}
    assert marked == {"fastllama [A]", "fastllama [B]"}


def test_failed_checks_come_first(tmp_path: Path) -> None:
    folder = results(tmp_path, Check("a", True, "fine"), Check("b", False, "1 | 2\n3"))
    assert rows(folder, "ed")[:2] == [["**b**", "**failed**", r"1 \| 2 3"], ["a", "passed", "fine"]]


def test_units_of_kernel_row(tmp_path: Path) -> None:
    folder = results(tmp_path, KERNEL)
    heading, row = rows(folder, "provider")[0], rows(folder, "| graph |")[0]
    cells = dict(zip(heading, row, strict=True))
    assert cells["device µs"] == "100 ± 1.0%"
    assert cells["host µs"] == "130"
    assert cells["achieved"] == "2,000 GB/s"
    assert cells["% of floor"] == "50%"
    assert cells["error"] == "1.0e-03"
    assert cells["peak MB"] == "100.0"


def test_kernel_with_matmul_shows_flops(tmp_path: Path) -> None:
    folder = results(tmp_path, replace(KERNEL, flops=5e10))
    assert "500 TFLOP/s" in rows(folder, "| graph |")[0]


@pytest.mark.parametrize(
    "other",
    [
        {"recipe": "llama-100m"},
        {"shape": {"M": 16384, "N": 768}},
        {"dtype": "float32"},
        {"phase": "backward"},
        {"operator": "rope"},
    ],
)
def test_kernel_ratios_are_per_cell(tmp_path: Path, other: dict[str, str]) -> None:
    elsewhere = replace(kernel(400e-6, "unpaired"), **other)
    folder = results(tmp_path, kernel(100e-6), kernel(150e-6, "peer"), elsewhere)
    ratios = {row[3]: row[-1] for row in rows(folder, "| graph |")}
    assert ratios == {"fastllama": "1.00", "peer": "1.50", "unpaired": ""}


def test_no_ratio_across_conditions(tmp_path: Path) -> None:
    results(tmp_path, kernel(100e-6), run("fastllama", 10.0))
    peers = kernel(150e-6, "peer"), run("trainer", 15.0)
    folder = results(tmp_path, *peers, conditions=replace(GPU, power_limit_watts=500.0))
    assert rows(folder, "peer [B]")[0][-1] == ""
    assert rows(folder, "trainer [B]")[0][3] == ""


def test_failures_are_listed(tmp_path: Path) -> None:
    failed = replace(kernel(1.0, "peer"), device_s=None, failure="RuntimeError:\nno such shape")
    failed_run = replace(
        RUN, contender="trainer", seconds_per_update=None, failure="no such | module"
    )
    text = report.markdown(results(tmp_path, failed, failed_run), [])
    line = r"- peer failed, llama-1b, M 16,384 · N 2,048, bfloat16: RuntimeError: no such shape"
    assert line in text
    assert r"- trainer failed: no such \| module" in text


def test_furthest_from_floor_is_sorted(tmp_path: Path) -> None:
    kernels = [replace(kernel(s * 1e-6), recipe=f"recipe-{s}") for s in range(100, 260, 8)]
    slow_peer = kernel(1.0, "peer")
    text = report.markdown(results(tmp_path, *kernels, slow_peer), [])
    section = text.partition("furthest from the floor")[2]
    listed = [line.split(" | ")[1] for line in section.splitlines() if "recipe-" in line]
    assert listed == [f"recipe-{s}" for s in range(252, 132, -8)]
    assert "peer" not in section


def test_training_row(tmp_path: Path) -> None:
    folder = results(tmp_path, run("fastllama", 10.0, 0.02), run("trainer", 15.0))
    heading = rows(folder, "contender")[0]
    ours, theirs = (dict(zip(heading, row, strict=True)) for row in rows(folder, "11.000 → 7.500"))
    assert ours["tok/s"] == "100,000 ± 1.0%"
    assert (ours["MFU causal"], ours["MFU PaLM"], ours["HFU"]) == ("41.0%", "45.0%", "48.0%")
    assert (ours["% of H"], ours["peak GB"], ours["ratio"]) == ("50.0%", "60.00", "1.00")
    assert (theirs["contender"], theirs["ratio"]) == ("trainer", "1.50")
    assert "rates measured here" in report.markdown(folder, [])


def test_void_rows(tmp_path: Path) -> None:
    void = run("trainer", 5.0, parity="loss 3 is off")
    void_ablation = run("fastllama without rope", 5.0, parity="loss 4 is off")
    folder = results(tmp_path, RUN, void, void_ablation)
    row, ablation = rows(folder, "**void**")
    assert row[0] == "**void** ~~trainer~~"
    assert row[2].startswith("~~")
    assert row[3:8] == [""] * 5
    assert ablation[2] == ""
    assert ablation[4] == ""
    text = report.markdown(folder, [])
    assert "**void** trainer: loss 3 is off" in text
    assert "**void** fastllama without rope: loss 4 is off" in text
    bar, void_bar = sorted(
        figures(folder)["training-throughput.png"].axes[0].patches, key=lambda patch: patch.get_y()
    )[::-1]
    assert (bar.get_hatch(), void_bar.get_hatch()) == (None, "///")


def test_no_ratio_to_our_void_run(tmp_path: Path) -> None:
    folder = results(tmp_path, run("fastllama", 5.0, parity="off"), run("trainer", 15.0))
    assert rows(folder, "trainer")[0][3] == ""


def test_ablation_verdicts(tmp_path: Path) -> None:
    folder = results(
        tmp_path,
        run("fastllama", 10.0, noise=0.03),
        replace(run("fastllama", 1.0), recipe="llama-100m"),
        run("fastllama without rope", 11.0, noise=0.03),
        run("fastllama without swiglu", 10.3, noise=0.03),
    )
    verdicts = {row[0]: (row[2], row[4]) for row in rows(folder, "sequences of") if "w" not in row}
    assert verdicts == {"rope": (SLOWER, "1.10"), "swiglu": (EQUAL, "1.03")}
    plot = figures(folder)["training-throughput.png"]
    names = [label.get_text() for axes in plot.axes for label in axes.get_yticklabels()]
    assert names == ["fastllama", "fastllama"]


def test_profile_is_sorted_by_gap(tmp_path: Path) -> None:
    shares = [
        ProfileShare("llama-1b", "matmul", 1.0, 0.8, 10, 0.95),
        ProfileShare("llama-1b", "idle", 0.06, 0.05, 0, None),
        ProfileShare("llama-1b", "attention", 0.3, 0.2, 4, 0.2),
    ]
    folder = results(tmp_path, *shares)
    classes = [row[0] for row in rows(folder, "%")]
    assert classes == ["attention", "idle", "matmul"]
    assert rows(folder, "attention")[0] == ["attention", "300", "20.0%", "4", "200", "100"]


def test_colours_are_shared_by_plots(tmp_path: Path) -> None:
    names = ["fastllama", *(f"peer {i}" for i in range(8))]
    folder = results(tmp_path, *(kernel(1e-4, n) for n in names), *(run(n, 10.0) for n in names))
    plots = figures(folder)
    lines = plots["kernels-floor.png"].axes[0].get_lines()
    dots = {str(line.get_label()): to_hex(line.get_color()) for line in lines}
    for name in ("training-throughput.png", "training-memory.png"):
        axes = plots[name].axes[0]
        labels = [label.get_text() for label in axes.get_yticklabels()]
        bars = {labels[round(p.get_y() + 0.4)]: to_hex(p.get_facecolor()) for p in axes.patches}
        assert bars == {label: dots[label] for label in names}
    assert [name for name in names if dots[name] == dots["fastllama"]] == ["fastllama"]


@pytest.mark.parametrize(
    ("old_noise", "new_noise", "threshold"),
    [(0.0, 0.0, 0.02), (0.01, 0.01, 0.02), (0.03, 0.04, 0.05), (0.0, 0.1, 0.1), (0.1, 0.0, 0.1)],
)
def test_verdict_threshold(old_noise: float, new_noise: float, threshold: float) -> None:
    old = spread(1.0, old_noise)
    assert verdict(old, spread(1 + threshold * 1.05, new_noise)) == SLOWER
    assert verdict(old, spread(1 + threshold * 0.95, new_noise)) == EQUAL
    assert verdict(old, spread(1 - threshold * 0.95, new_noise)) == EQUAL
    assert verdict(old, spread(1 - threshold * 1.05, new_noise)) == FASTER


def test_repeated_measurements_use_spread_of_medians(tmp_path: Path) -> None:
    old = results(tmp_path / "old", *(kernel(s * 1e-6) for s in (90, 100, 110)))
    new = results(tmp_path / "new", kernel(112e-6), replace(KERNEL, provider="peer"))
    (change,) = compare(old, new).changes
    assert change.ratio == pytest.approx(1.12)
    assert change.old.noise == pytest.approx(0.1)
    assert change.verdict == SLOWER
    assert verdict(change.old, spread(108e-6, 0.0)) == EQUAL


def test_comparison_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = [replace(KERNEL, recipe=recipe) for recipe in ("a", "b", "c", "gone")]
    new = [
        replace(kernel(seconds), recipe=recipe)
        for recipe, seconds in (("a", 80e-6), ("b", 130e-6), ("c", 100e-6), ("added", 1e-6))
    ]
    assert gate(monkeypatch, tmp_path, [*old, RUN], [*new, run("fastllama", 12.0)]) == 1
    out = capsys.readouterr().out
    order = [out.index(text) for text in ("forward, b", "training, ", "forward, c", "forward, a")]
    assert order == sorted(order)
    assert "1 only in the baseline: rms_norm forward, gone, " in out
    assert "1 only in the new folder: rms_norm forward, added, " in out
    assert out.splitlines()[-1] == "2 slower, 1 faster, 1 within noise"


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ([KERNEL], [KERNEL], 0),
        ([KERNEL], [kernel(50e-6)], 0),
        ([KERNEL], [kernel(110e-6)], 1),
        ([RUN], [run("fastllama", 11.0)], 1),
        ([RUN], [run("fastllama", 9.0)], 0),
        ([RUN], [replace(RUN, parity="off")], 1),
        ([replace(RUN, parity="off")], [replace(RUN, parity="off")], 0),
        ([RUN], [replace(RUN, seconds_per_update=None, failure="OOM")], 1),
        ([KERNEL], [replace(KERNEL, device_s=None, failure="raised")], 1),
        ([KERNEL], [replace(KERNEL, device_s=None, failure="raised"), KERNEL], 0),
        ([KERNEL], [replace(KERNEL, peak_bytes=103 * 10**6)], 1),
        ([KERNEL], [replace(KERNEL, peak_bytes=101 * 10**6)], 0),
        ([RUN], [replace(RUN, peak_bytes=70 * 10**9)], 1),
        ([Check("a", True, "")], [Check("a", False, "")], 1),
        ([Check("a", False, "")], [Check("a", False, "")], 0),
        ([Check("a", True, "")], [Check("a", False, ""), Check("a", True, "")], 0),
        ([KERNEL, kernel(1e-4, "peer")], [KERNEL, kernel(9e-4, "peer")], 0),
    ],
)
def test_gate_exit_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    old: list[Record],
    new: list[Record],
    code: int,
) -> None:
    assert gate(monkeypatch, tmp_path, old, new) == code


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        (replace(GPU, device="NVIDIA H100"), "NVIDIA H100 at 700 W against NVIDIA H200 at 700 W"),
        (replace(GPU, power_limit_watts=500.0), "H200 at 500 W against NVIDIA H200 at 700 W"),
        (replace(GPU, is_rehearsal=True), "H200 at 700 W (CPU rehearsal) against NVIDIA H200"),
    ],
)
def test_refuses_different_devices(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    conditions: Conditions,
    message: str,
) -> None:
    results(tmp_path / "old", KERNEL)
    results(tmp_path / "new", KERNEL, conditions=conditions)
    assert call(monkeypatch, tmp_path / "new", "--baseline", tmp_path / "old") == 2
    error = capsys.readouterr().err
    assert error.startswith("not comparable: ")
    assert message in error


def test_refuses_folder_with_mixed_devices(tmp_path: Path) -> None:
    results(tmp_path, KERNEL)
    both = results(tmp_path, KERNEL, conditions=replace(GPU, device="NVIDIA H100"))
    with pytest.raises(ValueError, match="not comparable"):
        compare(both, both)


def test_warns_of_different_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results(tmp_path / "old", KERNEL)
    newer = replace(GPU, torch="2.14.0", driver="580.0", commit="def", date="2026-12-01T00:00:00")
    results(tmp_path / "new", KERNEL, conditions=newer)
    assert call(monkeypatch, tmp_path / "new", "--baseline", tmp_path / "old") == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert warnings == [
        "warning: torch was 2.13.0, is 2.14.0",
        "warning: driver was 570.1, is 580.0",
    ]


def test_compared_rehearsal_is_labelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results(tmp_path, KERNEL, conditions=CPU)
    assert call(monkeypatch, tmp_path, "--baseline", tmp_path) == 0
    assert capsys.readouterr().out.startswith(REHEARSAL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "missing holds no results; give a folder"),
        (["damaged"], "checks.json is not a results file"),
        (["good", "damaged"], "checks.json is not a results file"),
        (["good", "other", "--out", "out"], "2 folders given; name one DIR"),
        (["good", "other", "--baseline", "good"], "exactly one DIR, 2 given"),
        (["--baseline", "good"], "exactly one DIR, 0 given"),
        (["good", "--baseline", "missing"], "missing holds no results"),
        (["good", "--baseline", "good", "--out", "out"], "leave out --out"),
        (["good", "--baseline", "other"], "no cell and no check in common"),
    ],
)
def test_wrong_arguments_write_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    results(tmp_path / "good", Check("a", True, ""))
    results(tmp_path / "other", Check("b", True, ""))
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "checks.json").write_text("[\n{")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_no_results_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert call(monkeypatch) == 2
    assert "holds results; run a benchmark first" in capsys.readouterr().err


def test_roofline_uses_measured_ceilings(tmp_path: Path) -> None:
    folder = results(tmp_path, *CEILINGS, KERNEL, replace(KERNEL, operator="x_linear", flops=5e10))
    moving, with_matmuls = figures(folder)["kernels-roofline.png"].axes
    (copy,) = (line for line in moving.get_lines() if len(line.get_xdata()) > 1)
    assert list(copy.get_ydata()) == [4.0, 4.0]
    lines = {str(line.get_label()): line for line in with_matmuls.get_lines()}
    x, roof = lines["roof"].get_data()
    assert max(roof) == pytest.approx(800)
    assert roof[0] == pytest.approx(4 * x[0])
    (point,) = (line for line in with_matmuls.get_lines() if len(line.get_xdata()) == 1)
    assert (point.get_xdata()[0], point.get_ydata()[0]) == pytest.approx((250, 500))
    serial = lines["floor (no overlap)"].get_ydata()
    assert all(math.isfinite(y) for y in serial)
    assert (serial < roof).all()


@pytest.mark.parametrize("folder", ["h100-80gb-hbm3", "h100-80gb-hbm3-first"])
def test_performance_page_has_the_committed_training_runs(folder: str) -> None:
    page = (RESULTS.parents[1] / "docs" / "performance.md").read_text()
    rows = [line.replace("**", "") for line in page.splitlines()]
    runs = [run for _, run in read(RESULTS / folder, TrainingRun)]
    assert runs
    for run in runs:
        assert run.tok_per_s is not None
        assert run.peak_bytes is not None
        causal, palm = (f"{100 * (mfu or 0):.1f} %" for mfu in (run.mfu_causal, run.mfu_palm))
        (row,) = [line for line in rows if f"| {run.tok_per_s:,.0f} |" in line]
        assert f"{causal} / {palm} | {run.peak_bytes / 1e9:.1f} GB" in row
