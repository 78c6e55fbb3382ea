"""Report of measurements: tables and plots of a folder of results, or what changed since another.

    python benchmarks/report.py [DIR ...] [--out DIR]
    python benchmarks/report.py NEW --baseline OLD

The first writes report.md and its plots, from the files in DIR and nothing else. The second
compares fastllama's own times, memory and checks in NEW with those in OLD, and exits with 1 where
any became worse beyond noise, so that it can stand between a change and its merge. What counts as
noise, and why, is in benchmarks/reporting/comparison.py. A mistake in the call, a damaged file, or
folders of different devices exit with 2 before anything is written.
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
    """The files of a report by name."""
    plots: dict[str, str | bytes] = {}
    for name, figure in figures(results).items():
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=120)
        plots[name] = png.getvalue()
    return {"report.md": markdown(results, list(plots)), **plots}


def markdown(results: ResultSet, plots: Sequence[str]) -> str:
    """The text of a report, of the sections there are records for."""
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
        lines.insert(0, "Measured under different conditions; rows carry the letter of theirs:\n")
    parts.append("\n".join(lines))
    parts.append(
        "Medians; ± is half the width of the middle half. Ratios are times over those of "
        f"{OURS} in the same cell under the same conditions, so above 1 is slower than {OURS}."
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
        "highest clock": "" if clock is None else f"{clock:,.0f} MHz",
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
    """What became slower first, then what no table of times shows; the sum is the last line."""
    for sentence in comparison.versions:
        print(f"warning: {sentence}")
    times = Table("cell", "old µs", "new µs", "new / old", "verdict")
    for change in comparison.changes:
        old, new = (f"{spread.median * 1e6:,.1f}" for spread in (change.old, change.new))
        times.add_row(name_of(change.key), old, new, f"{change.ratio:.3f}", change.verdict)
    if comparison.changes:
        # Where the output is a file there is no width, and 80 columns break every name.
        console = Console(width=None if sys.stdout.isatty() else 160, markup=False)
        console.print(times)
    for key, (was, now) in comparison.heavier.items():
        print(f"more memory: {name_of(key)}: {was / 1e6:,.1f} MB, now {now / 1e6:,.1f} MB")
    for name, problem in comparison.newly_failing.items():
        print(f"newly failing: {name}: {problem}")
    for names, where in ((comparison.only_old, "baseline"), (comparison.only_new, "new folder")):
        if names:
            print(f"{len(names)} only in the {where}: {'; '.join(names)}")
    print(comparison.summary)


def default_folders() -> list[Path]:
    """Every folder under benchmarks/results that holds results.

    Raises:
        ValueError: there is none.
    """
    folders = sorted({file.parent for name in FILES.values() for file in RESULTS.glob(f"*/{name}")})
    if not folders:
        raise ValueError(f"no folder under {RESULTS} holds results; measure first, or name one.")
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
        help="folders of results; every one under benchmarks/results unless given",
    )
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help="where a report goes; unless given, beside its data"
    )
    parser.add_argument(
        "--baseline", metavar="OLD", type=Path, help="compare the one DIR with this folder"
    )
    options = parser.parse_args()
    try:
        if options.baseline:
            sys.exit(run_comparison(options.folders, options.baseline, options.out))
        write_reports(options.folders or default_folders(), options.out)
    except ValueError as error:
        parser.exit(2, f"{error}\n")


def run_comparison(folders: Sequence[Path], baseline: Path, out: Path | None) -> int:
    """Print what changed; 1 where anything became worse.

    Raises:
        ValueError: a mistake in the call, or folders that cannot be compared.
    """
    if len(folders) != 1:
        raise ValueError(f"--baseline compares one DIR with it, {len(folders)} given; name one.")
    if out:
        raise ValueError(f"--baseline prints and writes nothing into {out}; leave out --out.")
    old, new = ResultSet.load(baseline), ResultSet.load(folders[0])
    comparison = compare(old, new)
    if new.is_rehearsal:
        print(REHEARSAL)
    print_comparison(comparison)
    return int(comparison.is_regression)


def write_reports(folders: Sequence[Path], out: Path | None) -> None:
    """Write and name the files of one report a folder.

    Raises:
        ValueError: a mistake in the call, or a folder without results.
    """
    if out and len(folders) > 1:
        raise ValueError(
            f"--out {out} takes one report, {len(folders)} folders given; name one DIR."
        )
    # All is read and drawn before anything is written.
    reports = {folder: report(ResultSet.load(folder)) for folder in folders}
    for folder, files in reports.items():
        target = out or folder
        target.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_atomic(target / name, content)
            print(target / name)


if __name__ == "__main__":
    main()
