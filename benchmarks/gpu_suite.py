"""Run all GPU benchmarks in one command and a fixed time.

    python benchmarks/gpu_suite.py [--minutes 9] [--out DIR] [--parts NAME …]

The parts run in the order of importance, each in its own process. A part saves every result as soon
as it is measured, so results survive a crash or a timeout:

    checks      operators and model against float64; no host sync, graph break or recompilation;
                with PyTorch 2.14, the kernels of an update are those counted without a GPU
    ceilings    copy, matmul and attention rates, for the floors and the bound of this device
    train-1b    tokens/s of llama-1b, next to plain PyTorch and the peers that are installed
    profile-1b  device time per class of kernels in an update of llama-1b
    kernels     every operator against its floor and its peers
    train-100m, profile-100m: the same for llama-100m
    tests       kernel tests on the device, if pytest is installed

Each part gets a share of the remaining time. Run few parts at a time, with --parts, to give each
enough. The suite needs the dependencies of this repository except tyro, and pytest for the tests.
Peers are measured if they are installed. Without a GPU the suite runs as a rehearsal: the same code
at toy sizes, timed with the CPU clock.
"""

import argparse
import contextlib
import importlib.util
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.ceilings import measure_ceilings, measured_rates
from benchmarks.checks import COUNTED_WITH, launch_check, model_check, operator_checks, step_checks
from benchmarks.conditions import current_conditions, default_device, has_gpu, results_name
from benchmarks.forks import run_forked
from benchmarks.operators.measure import CONFIGS, Floors, cells, measure
from benchmarks.results import (
    RESULTS,
    Ceiling,
    Check,
    Conditions,
    KernelTime,
    Record,
    append,
    read,
)
from benchmarks.step_profile import (
    listing,
    profile_shares,
    profile_updates,
    write_launches,
)
from benchmarks.throughput import exit_on_sigterm, unsupported_reason
from benchmarks.throughput import measure as measure_training
from benchmarks.training.child import with_batch_size
from benchmarks.training.trainer import trainer_step
from benchmarks.training.workload import rehearsal, with_synthetic_data, workload
from fastllama.config import Config, load_recipe
from fastllama.planning.bound import Rates, bound

ROOT = Path(__file__).parents[1]
KERNEL_TESTS = ROOT / "tests" / "kernels"
RECIPES = ("llama-1b", "llama-100m")
# A quarter of the recipe's tokens for llama-1b: enough updates for a median must fit into the time.
TOKENS_PER_UPDATE = {"llama-1b": 2**17, "llama-100m": 2**19}
CONTENDERS = ("fastllama", "reference-compiled", "huggingface-liger", "tutorial")
BATCH_SIZES = {
    "llama-1b": {"reference-compiled": 8, "tutorial": 8, "huggingface-liger": 4},
    "llama-100m": {"huggingface-liger": 32},
}
"""Sequences per micro-batch of contenders that would run out of an H100's memory at the recipe's.

A run that is out of memory is repeated at half the size, and compiles everything again.
"""
CHECKED_BATCH_SIZE = 4
"""Sequences per micro-batch of the checked update: it shares the device with the other checks."""
STEADY_SECONDS = 4.0 if has_gpu() else 1.0
N_PROFILED = 1
# Tests that do not exercise kernels on the GPU of this process.
CPU_ONLY_TESTS = ("test_compile_ahead.py", "test_sharded.py", "test_attention_choice.py")
# Extra seconds for a part to import, compile and stop.
GRACE = 10.0
# Exit codes of a part: its time is up, or the device is unusable in this process.
OUT_OF_TIME, DEVICE_LOST = 3, 4


@dataclass(frozen=True)
class Part:
    """One part of the suite, in its own process."""

    folder: Path
    deadline: float
    """`time.time()` at which the part must end."""
    conditions: Conditions

    def add(self, record: Record) -> None:
        """Save a record; exit with OUT_OF_TIME after the deadline."""
        append(self.folder, self.conditions, [record])
        if time.time() > self.deadline:
            sys.exit(OUT_OF_TIME)

    def measured_rates(self) -> Rates | None:
        """Rates for the bound H, if the ceilings are already measured."""
        return measured_rates([ceiling for _, ceiling in read(self.folder, Ceiling)])


def checks(part: Part) -> None:
    config = with_batch_size(recipe_config("llama-100m"), CHECKED_BATCH_SIZE)
    # Two micro-batches, to cover gradient accumulation.
    tokens = 2 * CHECKED_BATCH_SIZE * config.model.max_seq_len
    try:
        for check in step_checks(workload(config, tokens)):
            part.add(check)
    except Exception as error:  # Check the operators even if the trainer fails.
        part.add(Check("an update of the trainer", False, f"{type(error).__name__}: {error}"))
    if has_gpu() and torch.__version__.startswith(COUNTED_WITH):
        part.add(launch_check("llama-1b"))
    dtypes = (torch.bfloat16, torch.float32)
    for dtype in dtypes:
        part.add(model_check(dtype))
    for check in operator_checks(RECIPES if has_gpu() else ["quickstart"], dtypes):
        part.add(check)


def ceilings(part: Part) -> None:
    names = RECIPES if has_gpu() else ("quickstart",)
    configs = [load_recipe(CONFIGS / f"{name}.toml") for name in names]
    for ceiling in measure_ceilings(configs):
        part.add(ceiling)


def training(part: Part, recipe: str) -> None:
    config = recipe_config(recipe)
    with tempfile.TemporaryDirectory() as folder:
        measure_training(
            config,
            recipe if has_gpu() else f"{recipe}, shrunk",
            [name for name in CONTENDERS if unsupported_reason(name) is None],
            seconds=STEADY_SECONDS,
            batch_size=config.training.batch_size,
            tokens_per_update=config.training.tokens_per_update,
            deadline=part.deadline,
            rates=part.measured_rates(),
            folder=Path(folder),
            finished=part.add,
            batch_sizes=BATCH_SIZES[recipe],
        )


def kernels(part: Part) -> None:
    floors = Floors.of([ceiling for _, ceiling in read(part.folder, Ceiling)])
    # fastllama first, then plain PyTorch, then the libraries, then the slow compiled cells.
    # `both` is only needed where forward and backward are not comparable on their own.
    order = {"fastllama": 0, "fastllama in place": 1, "eager": 2, "compiled": 4}
    needs_both = ("cross_entropy", "linear_cross_entropy")
    todo = [
        cell
        for cell in cells(RECIPES, [torch.bfloat16])
        if cell.phase != "both" or cell.benchmark.operator in needs_both
    ]
    done = {
        (kernel.operator, kernel.recipe, kernel.phase, kernel.provider)
        for _, kernel in read(part.folder, KernelTime)
    }
    for cell in sorted(todo, key=lambda cell: order.get(cell.provider.name, 3)):
        key = (cell.benchmark.operator, cell.recipe, cell.phase, cell.provider.name)
        if key in done:
            continue
        with contextlib.suppress(ImportError):  # The provider is not installed.
            kernel = measure(cell, default_device(), floors)
            part.add(kernel)
            if kernel.failure and not device_is_usable():
                sys.exit(DEVICE_LOST)


def profile(part: Part, recipe: str) -> None:
    rates = part.measured_rates()
    config = recipe_config(recipe)
    tokens = config.training.tokens_per_update
    with tempfile.TemporaryDirectory() as data:
        config = with_synthetic_data(workload(config, tokens), Path(data) / "data")
        with trainer_step(config) as (step, world):
            step()
            launches, wall = profile_updates(step, N_PROFILED, world.device)
    allowed = None if rates is None else bound(config.model, tokens, rates)
    name = recipe if has_gpu() else f"{recipe}, shrunk"
    (part.folder / f"profile-{recipe}.txt").write_text(listing(launches, N_PROFILED))
    write_launches(part.folder / f"launches-{recipe}.json.gz", launches)
    for share in profile_shares(name, launches, wall, N_PROFILED, allowed, tokens):
        part.add(share)


def tests(part: Part) -> None:
    if importlib.util.find_spec("pytest") is None:
        part.add(Check("tests of the kernels", False, "not run: pytest is not installed"))
        return
    if not has_gpu():
        # `make test` runs the other tests on a CPU.
        part.add(run_tests(part, "tests of the kernels", ["test_swiglu.py"], [], part.deadline))
        return
    # The broadest file, attention with every backend, comes last.
    order = {"test_on_gpu.py": -1, "test_attention_backends.py": 1}
    files = sorted(file.name for file in KERNEL_TESTS.glob("test_*.py"))
    files.sort(key=lambda file: order.get(file, 0))
    half = (time.time() + part.deadline) / 2
    # In sequence: the tests with offsets beyond 2^31 need tens of gigabytes each.
    part.add(run_tests(part, "tests only a GPU can run", files, ["-m", "gpu"], half))
    files = [file for file in files if file not in CPU_ONLY_TESTS]
    options = ["-m", "not gpu"]
    if importlib.util.find_spec("xdist"):
        options += ["-n", "8", "--dist", "worksteal"]
    part.add(run_tests(part, "tests of the kernels", files, options, part.deadline))


# Processes in the background of a script ignore Ctrl-C, and what they start does as well.
PYTEST = """
import signal, sys, pytest
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(pytest.main())
"""


def run_tests(
    part: Part, name: str, files: Sequence[str], options: Sequence[str], deadline: float
) -> Check:
    """Run test files in order until the deadline. The output file lists the failures so far."""
    output = part.folder / f"{name.replace(' ', '-')}.txt"
    command = [sys.executable, "-c", PYTEST, "-q", "--tb=short", "-p", "no:cacheprovider"]
    command += [*options, *(str(KERNEL_TESTS / file) for file in files)]
    with output.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            code: int | None = process.wait(timeout=max(1.0, deadline - time.time()))
        except subprocess.TimeoutExpired:
            # Like Ctrl-C: pytest then reports the failures so far.
            process.send_signal(signal.SIGINT)
            code = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE / 2)
        process.kill()
        # A process that is stuck in the driver does not end.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE / 2)
    last = output.read_text().strip().splitlines()[-1:]
    detail = " ".join(["cut off:"] * (code is None) + last)
    return Check(name, code == 0, f"{detail}, see {output.name}")


def device_is_usable() -> bool:
    """Whether the device and CUDA graph capture still work after a failure."""
    if not has_gpu():
        return True
    try:
        torch.cuda.synchronize()
        x = torch.zeros(1, device="cuda")
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            x.add_(1)
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


PARTS: dict[str, tuple[Callable[[Part], None], float]] = {
    "checks": (checks, 80),
    "ceilings": (ceilings, 40),
    "train-1b": (partial(training, recipe="llama-1b"), 150),
    "profile-1b": (partial(profile, recipe="llama-1b"), 30),
    "kernels": (kernels, 80),
    "train-100m": (partial(training, recipe="llama-100m"), 80),
    "profile-100m": (partial(profile, recipe="llama-100m"), 30),
    "tests": (tests, 60),
}
"""Function of each part, and its requested seconds of nine minutes."""


def recipe_config(name: str) -> Config:
    """The recipe with the suite's tokens per update; shrunk in a rehearsal."""
    config = load_recipe(CONFIGS / f"{name}.toml")
    if not has_gpu():
        return rehearsal(config)
    training = replace(config.training, tokens_per_update=TOKENS_PER_UPDATE[name])
    return replace(config, training=training)


def run_suite(names: list[str], folder: Path, minutes: float, console: Console) -> bool:
    """Run the parts in sequence. True if no part failed and every check passed."""
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
        failure = run_part(name, folder, started + share)
        seconds = time.time() - started
        console.print(f"{name}: {seconds:.0f} s of {share:.0f}" + (failure and f", {failure}"))
        append(folder, conditions, [Check(f"part {name}", not failure, failure)])
    return all(check.passed for _, check in read(folder, Check))


def run_part(name: str, folder: Path, deadline: float) -> str:
    """Run a part. After DEVICE_LOST, rerun it for as long as each run adds results.

    Returns the error, empty on success.
    """
    while True:
        before = len(list(read(folder, KernelTime)))
        failure = spawn_part(name, folder, deadline, deadline + GRACE)
        gained = len(list(read(folder, KernelTime))) - before
        if not failure.startswith(f"exit {DEVICE_LOST}") or not gained or time.time() > deadline:
            return failure


def spawn_part(name: str, folder: Path, deadline: float, limit: float) -> str:
    """Run a part in its own process. Returns the error, empty on success."""
    log = folder / f"{name}.log"
    log.unlink(missing_ok=True)
    part = Part(folder, deadline, current_conditions())
    code = run_forked(call_part, (name, part), log, max(0.0, limit - time.time()))
    if code is None:
        return f"stopped at its time limit; earlier results are saved, see {log.name}"
    if code == OUT_OF_TIME:
        return "out of time; earlier results are saved"
    if code:
        lines = log.read_text().strip().splitlines()
        return f"exit {code}: {lines[-1] if lines else ''}, see {log.name}"
    return ""


def call_part(name: str, part: Part) -> None:
    """Run a part in this process."""
    run, _ = PARTS[name]
    run(part)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=9.0,
        help="total time, compilation included; default: %(default)g",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="results folder; default: benchmarks/results/<device>",
    )
    parser.add_argument(
        "--parts",
        metavar="NAME",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        help=f"run only these parts, of {', '.join(PARTS)}",
    )
    options = parser.parse_args()
    exit_on_sigterm()
    if options.minutes <= 1:
        parser.error(f"--minutes {options.minutes:g} is too short; give more than 1.")
    conditions = current_conditions()
    folder = options.out or RESULTS / results_name(conditions)
    folder.mkdir(parents=True, exist_ok=True)
    others = sorted({measured.commit for measured, _ in read(folder, Check)} - {conditions.commit})
    if others:
        parser.error(
            f"{folder} holds results of commit {', '.join(others)}, but this is "
            f"{conditions.commit}; give another --out, or remove the folder."
        )
    console = Console()
    kind = "rehearsal on the CPU" if conditions.is_rehearsal else "measuring"
    console.print(f"{kind}: {conditions.device}, torch {conditions.torch}, results in {folder}")
    all_passed = run_suite(options.parts, folder, options.minutes, console)
    console.print(f"report: python benchmarks/report.py {folder}")
    sys.exit(not all_passed)


if __name__ == "__main__":
    main()
