"""Search for kernel configurations that are faster than the pinned ones on this device.

    python benchmarks/tune.py [NAME ...] [--recipes NAME ...] [--minutes M] [--out DIR]

The search starts at the pinned configuration and moves to its fastest neighbour for as long as that
neighbour is faster beyond noise. Neighbours differ by one step in one parameter. Their timings are
interleaved, as described in benchmarks/timing.py. A neighbour that does not compile, or computes a
different result, is skipped. At the end the best configuration is timed again against the pinned
one. The command changes no code: to pin a configuration, edit the function that returns it, and
commit it with the results in tuning.json.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.ceilings import copy_ceilings, matmul_ceiling
from benchmarks.conditions import current_conditions, default_device, has_gpu, results_name
from benchmarks.operators.case import Work
from benchmarks.operators.measure import N_INPUTS, RECIPES, Floors, micro_batch
from benchmarks.operators.pinned import DTYPE, PINNED, LaunchConfig, Pinned
from benchmarks.reporting.tuning import HEADINGS, cells, is_faster, verdict
from benchmarks.results import RESULTS, Spread, Tuning, append
from benchmarks.throughput import REHEARSAL_TITLE, open_console
from benchmarks.timing import SECONDS, Timer, interleaved_seconds, make_timer
from fastllama.config import ModelConfig

DEFAULT_RECIPES = ["llama-1b", "llama-100m"] if has_gpu() else ["quickstart"]
LIMITS = {
    "BLOCK": (128, 2**15),
    "BLOCK_ROWS": (1, 64),
    "BLOCK_HEADS": (1, 64),
    "chunk_length": (512, 2**15),
    "programs_per_multiprocessor": (1, 32),
    "NUM_STAGES": (1, 6),
    "num_warps": (1, 32),
}
"""Limits of the searched parameters. All other options follow from the shape."""
UNIT_STEPS = ("NUM_STAGES", "programs_per_multiprocessor")
"""Parameters that also change in steps of one, not only by a factor of two."""

Measure = Callable[[Sequence[LaunchConfig]], list[Spread | None]]
"""Device seconds of each configuration; None for one that fails."""


def neighbours(config: LaunchConfig) -> Iterator[LaunchConfig]:
    """Configurations one step away in one parameter, or in BLOCK and num_warps together.

    Changing both by the same factor keeps the work per thread.
    """
    for name, (least, most) in LIMITS.items():
        if name in config:
            value = config[name]
            steps = [value // 2, 2 * value]
            if name in UNIT_STEPS:
                steps += [value - 1, value + 1]
            for step in sorted({step for step in steps if least <= step <= most} - {value}):
                yield config | {name: step}
    if {"BLOCK", "num_warps"} <= config.keys():
        for block, warps in (
            (config["BLOCK"] // 2, config["num_warps"] // 2),
            (2 * config["BLOCK"], 2 * config["num_warps"]),
        ):
            if _allowed("BLOCK", block) and _allowed("num_warps", warps):
                yield config | {"BLOCK": block, "num_warps": warps}


def _allowed(name: str, value: int) -> bool:
    least, most = LIMITS[name]
    return least <= value <= most


def hill_climb(start: LaunchConfig, measure: Measure) -> LaunchConfig:
    """Hill climbing from `start` to a configuration without a faster neighbour.

    `measure` receives the best configuration so far, followed by its untried neighbours. An empty
    result ends the search.
    """
    best, tried = start, [start]
    while candidates := [config for config in neighbours(best) if config not in tried]:
        tried += candidates
        times = measure([best, *candidates])
        if not times or times[0] is None:
            break
        timed = [
            (seconds, config)
            for seconds, config in zip(times[1:], candidates, strict=True)
            if seconds is not None and is_faster(seconds, times[0])
        ]
        if not timed:
            break
        _, best = min(timed, key=lambda entry: entry[0].median)
    return best


class Search:
    """The search for one pinned configuration, at the shape of one recipe."""

    def __init__(
        self,
        pinned: Pinned,
        recipe: str,
        model: ModelConfig,
        n_tokens: int,
        timer: Timer,
        floor_s: Callable[[Work], float],
        finished: Callable[[Tuning], None],
    ) -> None:
        """Create and run the search inside `timer.on_stream()`.

        Args:
            pinned: kernel to tune.
            recipe: name of `model`.
            model: model that determines the shape.
            n_tokens: tokens of a launch.
            timer: times the launches.
            floor_s: returns the least seconds for a piece of work.
            finished: called with every record.
        """
        self._pinned, self._recipe, self._model = pinned, recipe, model
        self._n_tokens, self._timer, self._finished = n_tokens, timer, finished
        self._floor_s = floor_s(pinned.work(model, n_tokens))
        self._start = pinned.config(model, n_tokens)
        self._wanted = self._results(self._start)
        self._inputs = [self._make_inputs(seed) for seed in range(N_INPUTS)]

    def run(self, deadline: float) -> tuple[Tuning, Tuning]:
        """Return the records of the pinned and of the best configuration, which may be the same.

        After `deadline`, in terms of `time.time()`, no more neighbours are tried.
        """

        def try_all(configs: Sequence[LaunchConfig]) -> list[Spread | None]:
            if time.time() > deadline:
                return []
            return [row.device_s for row in self._measure(configs, "tried")]

        best = hill_climb(self._start, try_all)
        if best == self._start:
            (row,) = self._measure([best], "pinned", 5 * SECONDS)
            return row, row
        was, found = self._measure([self._start, best], "found", 5 * SECONDS)
        return was, found

    def _measure(
        self, configs: Sequence[LaunchConfig], role: str, seconds: float = SECONDS
    ) -> list[Tuning]:
        """Check all configurations, and time the working ones interleaved."""
        failures = [self._failure(config) for config in configs]
        calls = [
            [self._call(config, inputs) for inputs in self._inputs]
            for config, failure in zip(configs, failures, strict=True)
            if not failure
        ]
        times = iter(interleaved_seconds(self._timer, calls, seconds) if calls else [])
        rows = [
            Tuning(
                name=self._pinned.name,
                recipe=self._recipe,
                n_tokens=self._n_tokens,
                dtype=str(DTYPE).removeprefix("torch."),
                config=config,
                role="pinned" if config == self._start else role,
                device_s=None if failure else next(times),
                floor_s=self._floor_s,
                failure=failure,
            )
            for config, failure in zip(configs, failures, strict=True)
        ]
        for row in rows:
            self._finished(row)
        return rows

    def _call(self, config: LaunchConfig, inputs: Sequence[object]) -> Callable[[], list[Tensor]]:
        def launch() -> list[Tensor]:
            with self._pinned.replaced_by(config):
                return self._pinned.launch(*inputs)

        return launch

    def _make_inputs(self, seed: int) -> Sequence[object]:
        generator = torch.Generator(default_device()).manual_seed(seed)
        return self._pinned.inputs(self._model, self._n_tokens, generator)

    def _results(self, config: LaunchConfig) -> list[Tensor]:
        """Outputs for fresh inputs; some launches write into their inputs."""
        return self._call(config, self._make_inputs(seed=0))()

    def _failure(self, config: LaunchConfig) -> str:
        """Why `config` cannot replace the pinned configuration; empty if it can."""
        try:
            results = self._results(config)
        except (
            Exception
        ) as error:  # Raised by Triton, for example out of shared memory; reported in the record.
            return f"{type(error).__name__}: {error}".splitlines()[0]
        for result, wanted in zip(results, self._wanted, strict=True):
            largest = wanted.double().abs().max()
            difference = ((result.double() - wanted.double()).abs().max() / largest).item()
            # Another order of summation may change the rounding. Written so that NaN fails.
            if not difference <= torch.finfo(DTYPE).eps:
                return f"differs from the pinned result by {difference:.1e} of the largest value"
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [pinned.name for pinned in PINNED]
    parser.add_argument(
        "names", metavar="NAME", nargs="*", help=f"any of {', '.join(names)}; default: all"
    )
    parser.add_argument(
        "--recipes",
        metavar="NAME",
        nargs="+",
        choices=RECIPES,
        default=DEFAULT_RECIPES,
        help=f"tune for these shapes, any of {', '.join(RECIPES)}; "
        f"default: {' '.join(DEFAULT_RECIPES)}",
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
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(names)):
        parser.error(f"unknown kernel {unknown[0]!r}; choose from {', '.join(map(repr, names))}.")
    if options.minutes <= 0:
        parser.error(f"--minutes must be positive, not {options.minutes:g}.")
    search_all(
        [pinned for pinned in PINNED if pinned.name in (options.names or names)],
        options.recipes,
        options.out,
        time.time() + 60 * options.minutes,
    )


def search_all(
    chosen: Sequence[Pinned], recipes: Sequence[str], out: Path | None, end: float
) -> None:
    """Tune each kernel at the shape of each recipe, and print the verdicts."""
    conditions, device, console = current_conditions(), default_device(), open_console()
    folder = out or RESULTS / results_name(conditions)
    timer = make_timer(device)
    table = Table(title=conditions.device if has_gpu() else REHEARSAL_TITLE)
    for heading in HEADINGS:
        table.add_column(heading)
    searches = [(pinned, recipe) for recipe in recipes for pinned in chosen]
    with timer.on_stream():
        ceilings = [*copy_ceilings(timer, device), matmul_ceiling(timer, device, DTYPE)]
        append(folder, conditions, ceilings)
        floors = Floors.of(ceilings)

        def floor_s(work: Work) -> float:
            return work.bytes / floors.bandwidth + work.flops / floors.matmul["bfloat16"]

        for number, (pinned, recipe) in enumerate(searches):
            now = time.time()
            model, n_tokens = micro_batch(recipe)
            search = Search(
                pinned,
                recipe,
                model,
                n_tokens,
                timer,
                floor_s,
                lambda row: append(folder, conditions, [row]),
            )
            was, found = search.run(now + (end - now) / (len(searches) - number))
            table.add_row(*cells(was, found))
            console.print(f"{pinned.name}, {recipe}: {verdict(was, found)}", highlight=False)
    console.print(table)


if __name__ == "__main__":
    main()
