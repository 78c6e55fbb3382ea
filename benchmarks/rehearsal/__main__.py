"""Rehearses CUDA updates on a machine without a GPU, and checks them against their budgets.

    python -m benchmarks.rehearsal [RECIPE ...] [--every] [--update]

Prints one line for each case, and a sentence for everything that is not as designed. Exits with 1
if there is any. `--every` rehearses every recipe with every option. `--update` stores the launch
lists as they are found. Needs the CUDA build of PyTorch, gcc and binutils: `make cuda-rehearsal`
installs and runs it.
"""

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.rehearsal.budgets import read_budget, write_budget
from benchmarks.rehearsal.build import build
from benchmarks.rehearsal.case import OPTIONS_OF, RECIPES, Case, Measured, cases
from benchmarks.rehearsal.checks import failures, gib
from benchmarks.rehearsal.end_to_end import run_end_to_end
from benchmarks.rehearsal.kernels import moved_bytes
from benchmarks.rehearsal.log import LAUNCHES, Call, launch_list
from benchmarks.rehearsal.mistakes import MISTAKES
from benchmarks.rehearsal.processes import Rehearsed, rehearse
from fastllama.config import Config, config_from_dict

PROCESSES = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", default=RECIPES, help="recipes to rehearse")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--every", action="store_true", help="every recipe with every option")
    parser.add_argument("--update", action="store_true", help="store the launch lists as found")
    parser.add_argument("--logs", type=Path, help="keep the logs in this new folder")
    parser.add_argument(
        "--libraries", type=Path, default=Path(".venv-cuda/null-cuda"), help="where to build"
    )
    options = parser.parse_args()
    libraries = options.libraries.resolve()
    build(libraries)
    wanted = [
        case
        for case in cases(every=options.every)
        if case.recipe in options.recipes and options.case in case.name
    ]
    console = Console(width=150, highlight=False)
    table = Table(
        "recipe", "case", "launches", "of these matmuls", "collectives", "GB moved", "peak GiB",
        "reserved", "host us/launch", "", title="An update of two micro-batches on the null device",
    )  # fmt: skip
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.logs or Path(temporary) / "logs"
        folder.mkdir(parents=True)
        run = partial(rehearse, libraries=libraries, folder=folder)
        found: dict[str, dict[str, Counter[str]]] = {}
        with ThreadPoolExecutor(PROCESSES) as pool:
            for case, measured, calls, failure in pool.map(run, wanted):
                if measured is None:
                    problems.append(f"{case.recipe}, {case.name}: {failure}")
                    table.add_row(case.recipe, case.name, *[""] * 7, "fails")
                    continue
                launches = launch_list(calls, measured.streams)
                found.setdefault(case.recipe, {})[case.name] = launches
                budget = launches if options.update else read_budget(case.recipe).get(case.name, {})
                config = config_from_dict(measured.config, source="the log")
                faults = list(failures(case, config, measured, calls, budget))
                problems += [f"{case.recipe}, {case.name}: {fault}" for fault in faults]
                table.add_row(case.recipe, case.name, *row(case, measured, calls, config, faults))
        if not (options.case or options.update):
            problems += rehearse_mistakes(run, console)
            problems += rehearse_commands(libraries, folder, console)
    if options.update:
        for recipe, lists in found.items():
            write_budget(recipe, lists)
    console.print(table)
    for problem in problems:
        console.print(problem, soft_wrap=True)
    sys.exit(1 if problems else 0)


def rehearse_mistakes(run: Callable[[Case], Rehearsed], console: Console) -> Iterator[str]:
    """Make each mistake, and print what the checks find; yield those that they do not find."""
    table = Table("mistake", "found", title="Mistakes made on purpose")
    budget = read_budget(OPTIONS_OF)
    for mistake, function in MISTAKES.items():
        case, measured, calls, failure = run(Case(OPTIONS_OF, 8, False, mistake=mistake))
        if measured is None:
            yield f"{mistake}: {failure}"
            continue
        config = config_from_dict(measured.config, source="the log")
        found = list(failures(case, config, measured, calls, budget[case.name]))
        table.add_row((function.__doc__ or "").strip(), "\n".join(found))
        if not found:
            yield f"{mistake}: no check finds it"
    console.print(table)


def rehearse_commands(libraries: Path, folder: Path, console: Console) -> Iterator[str]:
    """Run the command line from end to end; yield what is wrong."""
    files = folder / "commands"
    files.mkdir()
    table = Table("command", "", title="The command line on the null device")
    for title, fault in run_end_to_end(libraries, files):
        table.add_row(title, fault or "as designed")
        if fault:
            yield f"{title}: {fault}"
    console.print(table)


def row(
    case: Case, measured: Measured, calls: list[Call], config: Config, faults: list[str]
) -> list[str]:
    """What the table shows of a case."""
    kinds = Counter(call.kind for call in calls)
    n_launches = sum(kinds[kind] for kind in LAUNCHES)
    moved = moved_bytes(calls, config, case.ranks).total()
    return [
        str(n_launches),
        str(kinds["matmul"]),
        str(kinds["collective"]),
        f"{moved / 1e9:.1f}",
        f"{gib(measured.peak_bytes).removesuffix(' GiB')}"
        f" ({measured.peak_bytes / measured.planned_bytes - 1:+.1%})",
        gib(measured.reserved_bytes),
        f"{1e6 * measured.host_s / n_launches:.0f}",
        f"{len(faults)} faults" if faults else "as designed",
    ]


if __name__ == "__main__":
    main()
