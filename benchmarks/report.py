"""Write a report of a results folder, or compare two results folders.

    python benchmarks/report.py [DIR ...] [--out DIR]
    python benchmarks/report.py NEW --baseline OLD

The first form writes report.md and its plots from the files in DIR. The second form is a regression
gate: it compares fastllama's own times, memory and checks in NEW with OLD, and exits with 1 if any
became worse beyond noise. benchmarks/reporting/comparison.py defines and justifies the noise
threshold. Wrong arguments, a damaged file, or folders of different devices exit with 2 before
anything is written.
"""

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.reporting.comparison import Comparison, compare, name_of
from benchmarks.reporting.kernels import ceilings_section, furthest_section, kernels_section
from benchmarks.reporting.plots import figures
from benchmarks.reporting.result_set import OURS, REHEARSAL, ResultSet, set_letter, undated
from benchmarks.reporting.text import table
from benchmarks.reporting.training import ablations_section, profile_section, training_section
from benchmarks.reporting.tuning import tuning_section
from benchmarks.results import FILES, RESULTS, Conditions
from fastllama.atomic import write_atomic


def report(results: ResultSet) -> dict[str, str | bytes]:
    """Contents of the report's files by name."""
    plots: dict[str, str | bytes] = {}
    for name, figure in figures(results).items():
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=120)
        plots[name] = png.getvalue()
    return {"report.md": markdown(results, list(plots)), **plots}


def markdown(results: ResultSet, plots: Sequence[str]) -> str:
    """Text of the report, with one section per kind of record present."""
    sections = [
        _heading(results),
        _checks(results),
        ceilings_section(results),
        kernels_section(results),
        furthest_section(results),
        tuning_section(results),
        training_section(results),
        ablations_section(results),
        profile_section(results),
        "\n\n".join(["## Plots", *(f"![{name}]({name})" for name in plots)]) if plots else "",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _heading(results: ResultSet) -> str:
    devices = dict.fromkeys(conditions.device for conditions in results.condition_sets)
    parts = [f"# {' and '.join(devices)}"]
    if results.is_rehearsal:
        parts.insert(0, f"**{REHEARSAL}**")
    lines = []
    for index, conditions in enumerate(results.condition_sets):
        dates = sorted(c.date[:10] for c in results.measured_under if undated(c) == conditions)
        days = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
        lines.append(f"{_conditions_line(conditions)} · {days}")
        if len(results.condition_sets) > 1:
            kind = " (CPU rehearsal)" if conditions.is_rehearsal else ""
            lines[-1] = f"- **[{set_letter(index)}]** {conditions.device}{kind} · {lines[-1]}"
    if len(lines) > 1:
        lines.insert(
            0, "Measured under different conditions. The letter of a row refers to this list:\n"
        )
    parts.append("\n".join(lines))
    parts.append(
        "Values are medians; ± is half the interquartile range. A ratio is the time of a row over "
        f"the time of {OURS} in the same cell under the same conditions; above 1 is slower."
    )
    return "\n\n".join(parts)


def _conditions_line(conditions: Conditions) -> str:
    watts, clock = conditions.power_limit_watts, conditions.max_sm_clock_mhz
    facts = {
        "torch": conditions.torch,
        "triton": conditions.triton,
        "CUDA": conditions.cuda,
        "cuDNN": conditions.cudnn,
        "driver": conditions.driver,
        "power limit": "" if watts is None else f"{watts:g} W",
        "max clock": "" if clock is None else f"{clock:,.0f} MHz",
        "Python": conditions.python,
        "commit": conditions.commit,
    }
    return " · ".join(f"{name} {value or 'unknown'}" for name, value in facts.items())


def _checks(results: ResultSet) -> str:
    if not results.checks:
        return ""
    rows = []
    for conditions, check in sorted(results.checks, key=lambda entry: entry[1].passed):
        bold = "" if check.passed else "**"
        result = "passed" if check.passed else "failed"
        name = f"{bold}{check.name}{bold}{results.mark(conditions)}"
        rows.append((name, f"{bold}{result}{bold}", check.detail))
    return "## Checks\n\n" + table(("check", "result", "detail"), rows, n_text=3)


def print_comparison(comparison: Comparison) -> None:
    """Print the table of times, slowest change first, then all other changes and the summary."""
    for sentence in comparison.versions:
        print(f"warning: {sentence}")
    times = Table("cell", "old µs", "new µs", "new / old", "verdict")
    for change in comparison.changes:
        old, new = (f"{spread.median * 1e6:,.1f}" for spread in (change.old, change.new))
        times.add_row(name_of(change.key), old, new, f"{change.ratio:.3f}", change.verdict)
    if comparison.changes:
        # A file has no terminal width; the default of 80 columns would break every name.
        console = Console(width=None if sys.stdout.isatty() else 160, markup=False)
        console.print(times)
    for key, (was, now) in comparison.more_memory.items():
        print(f"more memory: {name_of(key)}: was {was / 1e6:,.1f} MB, is {now / 1e6:,.1f} MB")
    for name, problem in comparison.newly_failing.items():
        print(f"newly failing: {name}: {problem}")
    for names, where in ((comparison.only_old, "baseline"), (comparison.only_new, "new folder")):
        if names:
            print(f"{len(names)} only in the {where}: {'; '.join(names)}")
    print(comparison.summary)


def default_folders() -> list[Path]:
    """All folders under benchmarks/results that contain results.

    Raises:
        ValueError: no folder contains results.
    """
    folders = sorted({file.parent for name in FILES.values() for file in RESULTS.glob(f"*/{name}")})
    if not folders:
        raise ValueError(
            f"no folder under {RESULTS} holds results; run a benchmark first, or name a folder."
        )
    return folders


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folders",
        metavar="DIR",
        nargs="*",
        type=Path,
        help="results folders; default: all under benchmarks/results",
    )
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help="folder for the report; default: DIR"
    )
    parser.add_argument(
        "--baseline", metavar="OLD", type=Path, help="compare DIR with this results folder"
    )
    options = parser.parse_args()
    try:
        if options.baseline:
            sys.exit(run_comparison(options.folders, options.baseline, options.out))
        write_reports(options.folders or default_folders(), options.out)
    except ValueError as error:
        parser.exit(2, f"{error}\n")


def run_comparison(folders: Sequence[Path], baseline: Path, out: Path | None) -> int:
    """Print the comparison. Returns 1 if anything became worse, otherwise 0.

    Raises:
        ValueError: wrong arguments, or folders that cannot be compared.
    """
    if len(folders) != 1:
        raise ValueError(f"--baseline needs exactly one DIR, {len(folders)} given.")
    if out:
        raise ValueError(f"--baseline writes no files; leave out --out {out}.")
    old, new = ResultSet.load(baseline), ResultSet.load(folders[0])
    comparison = compare(old, new)
    if new.is_rehearsal:
        print(REHEARSAL)
    print_comparison(comparison)
    return int(comparison.is_regression)


def write_reports(folders: Sequence[Path], out: Path | None) -> None:
    """Write one report per folder, and print the names of its files.

    Raises:
        ValueError: wrong arguments, or a folder without results.
    """
    if out and len(folders) > 1:
        raise ValueError(
            f"--out {out} takes a single report, {len(folders)} folders given; name one DIR."
        )
    # Build all reports before writing, so that an error leaves no partial output.
    reports = {folder: report(ResultSet.load(folder)) for folder in folders}
    for folder, files in reports.items():
        target = out or folder
        target.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_atomic(target / name, content)
            print(target / name)


if __name__ == "__main__":
    main()
