"""Rehearses CUDA updates on a machine without a GPU, and checks them against their budgets.

    python -m benchmarks.rehearsal [RECIPE ...] [--update]

Prints one line for each case, and a sentence for everything that is not as designed. Exits with 1
if there is any. `--update` stores the launch lists as they are found. Needs the CUDA build of
PyTorch, gcc and binutils: `make cuda-rehearsal` installs and runs it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.rehearsal.budgets import read_budget, write_budget
from benchmarks.rehearsal.build import build, environment
from benchmarks.rehearsal.case import RECIPES, Case, Measured
from benchmarks.rehearsal.checks import failures, gib
from benchmarks.rehearsal.end_to_end import run_end_to_end
from benchmarks.rehearsal.kernels import moved_bytes
from benchmarks.rehearsal.log import LAUNCHES, Call, launch_list, read_log
from benchmarks.rehearsal.mistakes import MISTAKES
from fastllama.config import Config, config_from_dict

OPTIONS = (
    {"training.activation_checkpointing": "selective"},
    {"training.activation_checkpointing": "full"},
    {"training.deterministic": True},
    {"training.spike_z_score": 6.0},
    {"training.ema_decay": 0.999},
    {"training.compile_scope": "model"},
    {"model.dropout": 0.1},
    {"parallel.reduce_dtype": "bfloat16"},
    {"parallel.reshard_after_forward": True},
    {"parallel.accumulate": "sharded"},
    {"parallel.replicate": 2},
)
"""Each option that changes what a step launches."""
OPTIONS_OF = "llama-1b"
"""The recipe that is rehearsed with every option."""
GROUPED = "llama-3.2-1b"
"""A recipe with grouped heads, of which the attention backends differ."""
PROCESSES = 2


def cases() -> Iterator[Case]:
    """Every recipe at 1 and 8 ranks, eager and compiled; one of them with every option."""
    for recipe in RECIPES:
        for ranks in (1, 8):
            for compiled in (False, True):
                # Eight billion parameters need more than one device.
                if not (recipe == "llama-3.1-8b" and ranks == 1):
                    yield Case(recipe, ranks, compiled)
    for options in OPTIONS:
        for compiled in (False, True):
            if compiled or "training.compile_scope" not in options:
                yield Case(OPTIONS_OF, 8, compiled, dict(options))
    for recipe in (OPTIONS_OF, GROUPED):
        yield Case(recipe, 8, True, {"training.attention": "cudnn"})


class Rehearsed(NamedTuple):
    """A case and what its process left."""

    case: Case
    measured: Measured | None
    calls: list[Call]
    failure: str
    """The last line of a process that failed."""


def rehearse(case: Case, *, libraries: Path, folder: Path) -> Rehearsed:
    """Run one case in a process on the null device."""
    files = folder / f"{case.recipe}, {case.name} {case.mistake}".strip()
    files.mkdir()
    variables = {
        "TORCHINDUCTOR_CACHE_DIR": str(libraries / "inductor"),
        "TRITON_CACHE_DIR": str(libraries / "triton"),
        "XDG_CACHE_HOME": str(files),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
    if case.ranks > 1:
        variables |= {"RANK": "0", "WORLD_SIZE": str(case.ranks), "LOCAL_RANK": "0"}
    command = [sys.executable, "-m", "benchmarks.rehearsal.step", json.dumps(asdict(case))]
    done = subprocess.run(
        [*command, str(files)],
        capture_output=True,
        text=True,
        check=False,
        env=environment(libraries, **variables),
    )
    if done.returncode:
        (files / "error.log").write_text(done.stdout + done.stderr)
        lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
        return Rehearsed(case, None, [], lines[-1])
    measured = Measured(**json.loads((files / "measured.json").read_text()))
    return Rehearsed(case, measured, read_log(files / "update.log"), "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", default=RECIPES, help="recipes to rehearse")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--update", action="store_true", help="store the launch lists as found")
    parser.add_argument("--logs", type=Path, help="keep the logs in this new folder")
    parser.add_argument(
        "--libraries", type=Path, default=Path(".venv-cuda/null-cuda"), help="where to build"
    )
    options = parser.parse_args()
    libraries = options.libraries.resolve()
    build(libraries)
    wanted = [
        case for case in cases() if case.recipe in options.recipes and options.case in case.name
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
