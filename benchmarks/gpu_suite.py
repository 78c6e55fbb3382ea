"""Everything worth knowing of a GPU, in one command and a fixed time.

    python benchmarks/gpu_suite.py [--minutes 9] [--out DIR] [--parts NAME …]

Parts run in the order of their worth, each in a process of its own that adds to the results as it
goes, so that a suite that is cut off, or a part that crashes, leaves what was measured before:

    checks      operators and model against float64; no waiting, no broken graph, no recompilation
    ceilings    copy, matrix products, attention: the floors and the bound of this device
    train-1b    tokens a second of llama-1b, and of plain PyTorch, compiled, beside it
    kernels     every operator against its floor and its peers
    train-100m  as above for llama-100m
    profile     where the time of an update of llama-1b goes
    tests       the tests of the kernels, on the device, where pytest is installed

Each part may take its share of the time that is left. Needs torch, triton and this repository;
peers are measured where they are installed. Where there is no GPU it is a rehearsal: the same
code at toy sizes on a CPU's clock.
"""

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.ceilings import measure_ceilings, measured_rates
from benchmarks.checks import model_check, operator_checks, step_checks
from benchmarks.conditions import current_conditions, default_device, has_gpu, results_name
from benchmarks.operators.measure import CONFIGS, Floors, cells, measure
from benchmarks.results import RESULTS, Ceiling, Check, Conditions, Record, append, read
from benchmarks.step_profile import profile_shares, profile_updates
from benchmarks.throughput import exit_when_terminated
from benchmarks.throughput import measure as measure_training
from benchmarks.training.trainer import trainer_step
from benchmarks.training.workload import rehearsal, with_synthetic_data, workload
from fastllama.config import Config, load_recipe
from fastllama.estimate import Rates, bound

ROOT = Path(__file__).parents[1]
RECIPES = ("llama-1b", "llama-100m")
# Halved where they do not fit. Updates of the 1B are a quarter of the recipe's: as many of them as
# tell a median have to fit into the time.
BATCH_SIZES = {"llama-1b": 16, "llama-100m": 64}
TOKENS_PER_UPDATE = {"llama-1b": 2**17, "llama-100m": 2**19}
CONTENDERS = {
    "llama-1b": ("fastllama", "reference-compiled"),
    "llama-100m": ("fastllama", "reference-compiled", "tutorial"),
}
N_PROFILED = 2
# Seconds that importing, compiling and stopping may take beyond what a part plans.
GRACE = 10.0
# Exit code of a part that has measured for as long as it may.
OUT_OF_TIME = 3


@dataclass(frozen=True)
class Part:
    """One part of the suite, running in a process of its own."""

    folder: Path
    deadline: float
    """A moment of `time.time()`."""
    conditions: Conditions

    def add(self, record: Record) -> None:
        """Keep a record; the part ends when its time has passed."""
        append(self.folder, self.conditions, [record])
        if time.time() > self.deadline:
            sys.exit(OUT_OF_TIME)

    def measured_rates(self) -> Rates | None:
        """What the bound H needs, where the ceilings were measured before."""
        return measured_rates([ceiling for _, ceiling in read(self.folder, Ceiling)])


def checks(part: Part) -> None:
    dtypes = (torch.bfloat16, torch.float32)
    for check in operator_checks(RECIPES if has_gpu() else ["quickstart"], dtypes):
        part.add(check)
    for dtype in dtypes:
        part.add(model_check(dtype))
    config = recipe_config("llama-100m")
    # Two micro-batches are enough to accumulate.
    tokens = 2 * config.training.batch_size * config.model.max_seq_len
    for check in step_checks(workload(config, tokens)):
        part.add(check)


def ceilings(part: Part) -> None:
    names = RECIPES if has_gpu() else ("quickstart",)
    models = [load_recipe(CONFIGS / f"{name}.toml").model for name in names]
    for ceiling in measure_ceilings(models):
        part.add(ceiling)


def training(part: Part, recipe: str) -> None:
    config = recipe_config(recipe)
    with tempfile.TemporaryDirectory() as folder:
        measure_training(
            config,
            recipe if has_gpu() else f"{recipe}, shrunk",
            CONTENDERS[recipe],
            seconds=10.0 if has_gpu() else 1.0,
            batch_size=config.training.batch_size,
            tokens_per_update=config.training.tokens_per_update,
            deadline=part.deadline,
            rates=part.measured_rates(),
            folder=Path(folder),
            finished=part.add,
        )


def kernels(part: Part) -> None:
    floors = Floors.of([ceiling for _, ceiling in read(part.folder, Ceiling)])
    # Ours first, then plain PyTorch, then who is installed: the last are cut off first. Where
    # forward and backward compare, both together say nothing more.
    first = ("fastllama", "fastllama in place", "eager", "compiled")
    order = {name: place for place, name in enumerate(first)}
    in_one = ("cross_entropy", "linear_cross_entropy")
    todo = [
        cell
        for cell in cells(RECIPES, [torch.bfloat16])
        if cell.phase != "both" or cell.benchmark.operator in in_one
    ]
    for cell in sorted(todo, key=lambda cell: order.get(cell.provider.name, len(first))):
        with contextlib.suppress(ImportError):  # Not installed.
            part.add(measure(cell, default_device(), floors))


def profile(part: Part) -> None:
    recipe, rates = "llama-1b", part.measured_rates()
    config = recipe_config(recipe)
    tokens = config.training.tokens_per_update
    with tempfile.TemporaryDirectory() as data:
        config = with_synthetic_data(workload(config, tokens), Path(data) / "data")
        with trainer_step(config) as (step, world):
            step()
            launches, wall, table = profile_updates(step, N_PROFILED, world.device)
    (part.folder / "profile.txt").write_text(table)
    allowed = None if rates is None else bound(config.model, tokens, rates)
    name = recipe if has_gpu() else f"{recipe}, shrunk"
    for share in profile_shares(name, launches, wall, N_PROFILED, allowed, tokens):
        part.add(share)


def tests(part: Part) -> None:
    name, output = "tests of the kernels", part.folder / "tests.txt"
    if importlib.util.find_spec("pytest") is None:
        part.add(Check(name, False, "not run: pytest is not installed"))
        return
    # What only a GPU can show comes first. A rehearsal runs one file: `make test` has the rest.
    files = ["test_on_gpu.py", "test_model_parity.py", "."] if has_gpu() else ["test_swiglu.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [str(ROOT / "tests" / "kernels" / file) for file in files]
    left = max(1.0, part.deadline - time.time())
    with output.open("w") as file:
        try:
            code = subprocess.run(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=left, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
    last = output.read_text().strip().splitlines()[-1:]
    detail = " ".join(["cut off:"] * (code is None) + last)
    part.add(Check(name, code == 0, f"{detail}, see {output.name}"))


PARTS: dict[str, tuple[Callable[[Part], None], float]] = {
    "checks": (checks, 60),
    "ceilings": (ceilings, 45),
    "train-1b": (partial(training, recipe="llama-1b"), 170),
    "kernels": (kernels, 100),
    "train-100m": (partial(training, recipe="llama-100m"), 80),
    "profile": (profile, 45),
    "tests": (tests, 50),
}
"""What runs, and the seconds it asks for of nine minutes."""


def recipe_config(name: str) -> Config:
    """A recipe with the micro-batch the suite runs it with; a toy of it in a rehearsal."""
    config = load_recipe(CONFIGS / f"{name}.toml")
    if not has_gpu():
        return rehearsal(config)
    training = replace(
        config.training, batch_size=BATCH_SIZES[name], tokens_per_update=TOKENS_PER_UPDATE[name]
    )
    return replace(config, training=training)


def run_suite(names: list[str], folder: Path, minutes: float, console: Console) -> bool:
    """Run parts one after the other; whether none crashed and no check failed."""
    end = time.time() + 60 * minutes
    conditions = current_conditions()
    for number, name in enumerate(names):
        left = end - time.time() - GRACE
        if left < GRACE:
            console.print(f"{name}: no time left")
            append(folder, conditions, [Check(f"part {name}", False, "no time left")])
            continue
        wanted = [PARTS[other][1] for other in names[number:]]
        share = left * wanted[0] / sum(wanted)
        started = time.time()
        failure = spawn_part(name, folder, started + share, started + share + GRACE)
        seconds = time.time() - started
        console.print(f"{name}: {seconds:.0f} s of {share:.0f}" + (failure and f", {failure}"))
        append(folder, conditions, [Check(f"part {name}", not failure, failure)])
    return all(check.passed for _, check in read(folder, Check))


def spawn_part(name: str, folder: Path, deadline: float, limit: float) -> str:
    """Run a part in a process of its own; what went wrong, or nothing."""
    log = folder / f"{name}.log"
    command = [sys.executable, str(Path(__file__)), "--part", name, "--out", str(folder)]
    command += ["--deadline", str(deadline)]
    with log.open("w") as file:
        # A session of its own, so that what it started ends with it.
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=max(0.0, limit - time.time()))
        except subprocess.TimeoutExpired:
            stop(process)
            return f"stopped after its time; what it measured before is kept, see {log.name}"
    if code == OUT_OF_TIME:
        return "out of time; what it measured before is kept"
    if code:
        lines = log.read_text().strip().splitlines()
        return f"exit {code}: {lines[-1] if lines else ''}, see {log.name}"
    return ""


def stop(process: subprocess.Popen[bytes]) -> None:
    """Let it end what it started, which may be in a session of its own; then end it."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=5)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="time in all, compiling too")
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help="folder of results; default: one by device"
    )
    parser.add_argument(
        "--parts",
        metavar="NAME",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        help="run these alone",
    )
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.minutes <= 1:
        parser.error(f"--minutes {options.minutes:g} is too short for a part; give more than 1.")
    conditions = current_conditions()
    folder = options.out or RESULTS / results_name(conditions)
    folder.mkdir(parents=True, exist_ok=True)
    if options.part:
        exit_when_terminated()
        run, _ = PARTS[options.part]
        run(Part(folder, options.deadline, conditions))
        return
    others = sorted({measured.commit for measured, _ in read(folder, Check)} - {conditions.commit})
    if others:
        parser.error(
            f"{folder} holds results of {', '.join(others)}, and this is {conditions.commit}; give "
            "another --out, or remove it."
        )
    console = Console()
    kind = "rehearsal on the CPU" if conditions.is_rehearsal else "measuring"
    console.print(f"{kind}: {conditions.device}, torch {conditions.torch}, results in {folder}")
    good = run_suite(options.parts, folder, options.minutes, console)
    console.print(f"report: python benchmarks/report.py {folder}")
    sys.exit(not good)


if __name__ == "__main__":
    main()
