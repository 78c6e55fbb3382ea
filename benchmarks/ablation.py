"""What each optimisation of fastllama brings: everything on, and each alone off.

    python benchmarks/ablation.py [RECIPE.toml] [--without NAME ...] [--rounds N] [--seconds S]
        [--batch-size N] [--out DIR]

Every run is a process of its own; the full one comes first, last and after every second other, and
a variant is compared with the full ones before and after it, so that what the device does in the
meantime falls on both. On a CPU a shrunken recipe rehearses it: kernels are plain there with and
without, the rest differs.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import results
from benchmarks.conditions import current_conditions, has_gpu, results_name
from benchmarks.results import Spread, TrainingRun
from benchmarks.throughput import (
    GPU_RECIPES,
    REHEARSAL_TITLE,
    REHEARSED_RECIPES,
    exit_when_terminated,
    number,
    open_console,
    report,
)
from benchmarks.training.child import Child, with_batch_size
from benchmarks.training.row import assumed_rates, baseline, parity, training_run, verdict
from benchmarks.training.workload import rehearsal, with_synthetic_data, workload
from fastllama.config import Config, load_recipe, validate
from fastllama.planning.bound import Rates
from fastllama_kernels import Operators

FULL = "fastllama"
RUN_BETWEEN = 2
"""Variants between two full runs."""
NOISE = 0.005
"""Two processes of one code differ by this much beyond the spread of their updates."""


@dataclass(frozen=True)
class Variant:
    """fastllama with one thing off."""

    change: Callable[[Config], Config] = lambda config: config
    plain_operators: tuple[str, ...] = ()
    """Fields of `Operators` taken from REFERENCE."""
    is_of_kernels: bool = False
    """Changes nothing where there is no GPU to run kernels on."""


def with_training(**options: Any) -> Callable[[Config], Config]:
    """The change of options of `training`."""
    return lambda config: replace(config, training=replace(config.training, **options))


def without_prefetch(config: Config) -> Config:
    return replace(config, data=replace(config.data, prefetch=1))


def with_resharding(config: Config) -> Config:
    """Free gathered parameters after use, so that every micro-batch gathers them again."""
    return replace(config, parallel=replace(config.parallel, reshard_after_forward=True))


def of_family(name: str) -> tuple[str, ...]:
    """The operators that have `name` in theirs."""
    return tuple(field.name for field in dataclasses.fields(Operators) if name in field.name)


VARIANTS = {
    "rms_norm": Variant(plain_operators=of_family("rms_norm"), is_of_kernels=True),
    "rope": Variant(plain_operators=("rope",), is_of_kernels=True),
    "swiglu": Variant(plain_operators=of_family("swiglu"), is_of_kernels=True),
    "fused-loss": Variant(plain_operators=("linear_cross_entropy",), is_of_kernels=True),
    "kernels": Variant(with_training(kernels="reference"), is_of_kernels=True),
    # PyTorch's own kernel, which is there without installing anything.
    "attention": Variant(
        with_training(attention="flash" if has_gpu() else "reference"), is_of_kernels=True
    ),
    "compile": Variant(with_training(compile=False)),
    "prefetch": Variant(without_prefetch),
    "kept-parameters": Variant(with_resharding),
}
"""By what is off."""


def order(without: Sequence[str], rounds: int) -> list[str | None]:
    """What runs, one after the other; None is the full one."""
    names: list[str | None] = [None]
    for _ in range(rounds):
        for first in range(0, len(without), RUN_BETWEEN):
            names += [*without[first : first + RUN_BETWEEN], None]
    return names


def measure(
    config: Config,
    recipe: str,
    without: Sequence[str],
    *,
    rounds: int,
    seconds: float,
    deadline: float | None,
    rates: Rates | None,
    folder: Path,
    finished: Callable[[TrainingRun], None],
) -> list[TrainingRun]:
    """Train with everything, and without each of the named; see `throughput.measure`.

    All at the batch size of `config`, because a rate at another one answers another question.
    """
    config = workload(config, config.training.tokens_per_update)
    validate(config)
    config = with_synthetic_data(config, folder / "data")
    runs: list[TrainingRun] = []
    for name in order(without, rounds):
        if deadline is not None and time.time() >= deadline:
            break
        variant = Variant() if name is None else VARIANTS[name]
        contender = FULL if name is None else f"{FULL} without {name}"
        child = Child("fastllama", folder, seconds, deadline, variant.plain_operators)
        changed = variant.change(config)
        run = training_run(contender, recipe, changed, child.train_once(changed), rates)
        run = replace(run, parity=parity(run, baseline(runs)))
        if variant.is_of_kernels and not has_gpu():
            run = replace(run, details=f"{run.details}; on a CPU the full one is as plain")
        finished(run)
        runs.append(run)
    return runs


@dataclass(frozen=True)
class Effect:
    """What a variant does to the rate."""

    ratio: float
    """Of its rate to that of the full runs around it; the median of the rounds."""
    low: float
    """The least that the spreads of the updates allow, over all rounds."""
    high: float
    """The most."""

    @property
    def verdict(self) -> str:
        """Of what is off."""
        if self.high < 1 - NOISE:
            return "pays"
        return "costs" if self.low > 1 + NOISE else "no difference beyond noise"


def extent(spread: Spread) -> tuple[float, float]:
    """The middle half widened by its width on either side, which holds nearly all of a quiet run.

    The middle halves of two runs of one code often miss each other on a machine that others use.
    """
    width = spread.high / spread.low
    return spread.low / width, spread.high * width


def effect(runs: Sequence[TrainingRun], contender: str) -> Effect | None:
    """Of one variant among `runs` in their order; None where it or a full run has no time."""
    ratios, lows, highs = [], [], []
    for index, run in enumerate(runs):
        if run.contender != contender:
            continue
        before = next((full for full in reversed(runs[:index]) if full.contender == FULL), None)
        after = next((full for full in runs[index:] if full.contender == FULL), None)
        full_spreads = [full.seconds_per_update for full in (before, after) if full is not None]
        spreads = [spread for spread in full_spreads if spread is not None]
        own = run.seconds_per_update
        if own is None or not spreads:
            return None
        ratios.append(statistics.mean(spread.median for spread in spreads) / own.median)
        least, most = extent(own)
        lows.append(min(extent(spread)[0] for spread in spreads) / most)
        highs.append(max(extent(spread)[1] for spread in spreads) / least)
    return Effect(statistics.median(ratios), min(lows), max(highs)) if ratios else None


def table(title: str, runs: Sequence[TrainingRun]) -> Table:
    """A row a variant, the full run first."""
    shown = Table("without", "tok/s", "to full", "range", "peak GB", "verdict", title=title)
    full = next(run for run in runs if run.contender == FULL)
    for contender in dict.fromkeys(run.contender for run in runs):
        run = next(run for run in runs if run.contender == contender)
        found = None if contender == FULL else effect(runs, contender)
        change = None
        if run.peak_bytes is not None and full.peak_bytes is not None and contender != FULL:
            change = run.peak_bytes - full.peak_bytes
        said = found.verdict if found and verdict(run) == "valid" else verdict(run)
        shown.add_row(
            contender.removeprefix(f"{FULL} without "),
            number(run.tok_per_s, ",.0f"),
            number(found.ratio if found else None, ".3f"),
            f"{found.low:.3f} to {found.high:.3f}" if found else "-",
            number(run.peak_bytes, ".2f", unit=1e9)
            + ("" if change is None else f" ({number(change, '+.2f', unit=1e9)})"),
            said,
        )
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    exit_when_terminated()
    on_gpu = has_gpu()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default_recipe = (GPU_RECIPES if on_gpu else REHEARSED_RECIPES)[0]
    parser.add_argument(
        "recipe",
        nargs="?",
        type=Path,
        default=default_recipe,
        metavar="RECIPE.toml",
        help="default: the 1B; on a CPU the quickstart, shrunk",
    )
    # To compile takes a CPU longer than all the rest of a rehearsal.
    default_variants = [name for name in VARIANTS if on_gpu or name != "compile"]
    parser.add_argument(
        "--without",
        metavar="NAME",
        nargs="+",
        choices=VARIANTS,
        default=default_variants,
        help=f"of {', '.join(VARIANTS)}; default: each of them",
    )
    parser.add_argument(
        "--rounds", metavar="N", type=int, default=1, help="times each variant runs; default: 1"
    )
    parser.add_argument(
        "--seconds",
        metavar="S",
        type=float,
        default=20.0 if on_gpu else 2.0,
        help="of steady state, at least three updates; now %(default)s",
    )
    parser.add_argument(
        "--batch-size", metavar="N", type=int, help="sequences of a micro-batch; the recipe's"
    )
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help="folder of results; default: one by device"
    )
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, not {options.rounds}")
    console = open_console()
    conditions = current_conditions()
    out = options.out or results.RESULTS / results_name(conditions)

    def finished(run: TrainingRun) -> None:
        results.append(out, conditions, [run])
        report(run, console)

    try:
        config = load_recipe(options.recipe)
        if not on_gpu:
            config = rehearsal(config)
            config = with_training(compile="compile" in options.without)(config)
        if options.batch_size is not None:
            config = with_batch_size(config, options.batch_size)
        with tempfile.TemporaryDirectory() as folder:
            runs = measure(
                config,
                options.recipe.stem if on_gpu else f"{options.recipe.stem}, shrunk",
                options.without,
                rounds=options.rounds,
                seconds=options.seconds,
                deadline=None,
                rates=assumed_rates(),
                folder=Path(folder),
                finished=finished,
            )
    except ValueError as error:
        parser.error(str(error))
    title = f"{options.recipe.stem} on {conditions.device}, rates to those of everything on"
    console.print(table(title if on_gpu else f"{title}\n{REHEARSAL_TITLE}", runs))


if __name__ == "__main__":
    main()
