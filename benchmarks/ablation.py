"""Ablations: the speed of fastllama with one optimisation off at a time.

    python benchmarks/ablation.py [RECIPE.toml] [--without NAME ...] [--rounds N] [--seconds S]
        [--batch-size N] [--out DIR]

Each run is a separate process. Full runs, with everything on, come first, last, and after every two
variants. A variant is compared with the full runs before and after it, so that drift of the device
affects both. On a CPU the same code runs with a shrunken recipe, as a rehearsal. The kernels are
plain PyTorch there in every run, so only the other variants have an effect.
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
    exit_on_sigterm,
    number,
    open_console,
    report,
)
from benchmarks.training.child import Child, with_batch_size
from benchmarks.training.row import baseline, known_rates, parity, training_run, verdict
from benchmarks.training.workload import rehearsal, with_synthetic_data, workload
from fastllama.config import Config, load_recipe, validate
from fastllama.planning.bound import Rates
from fastllama_kernels import Operators

FULL = "fastllama"
VARIANTS_BETWEEN_FULL_RUNS = 2
NOISE = 0.005
"""Relative difference between processes of the same code, beyond the spread of their updates."""


@dataclass(frozen=True)
class Variant:
    """fastllama with one optimisation off."""

    change: Callable[[Config], Config] = lambda config: config
    plain_operators: tuple[str, ...] = ()
    """Fields of `Operators` to take from REFERENCE."""
    needs_kernels: bool = False
    """Changes nothing on a CPU, where no kernels run."""


def with_training(**options: Any) -> Callable[[Config], Config]:
    """A change of options in the section `training`."""
    return lambda config: replace(config, training=replace(config.training, **options))


def without_prefetch(config: Config) -> Config:
    return replace(config, data=replace(config.data, prefetch=1))


def with_resharding(config: Config) -> Config:
    """Free gathered parameters after use; every micro-batch then gathers them again."""
    return replace(config, parallel=replace(config.parallel, reshard_after_forward=True))


def operators_named(name: str) -> tuple[str, ...]:
    """Fields of `Operators` whose name contains `name`."""
    return tuple(field.name for field in dataclasses.fields(Operators) if name in field.name)


VARIANTS = {
    "rms_norm": Variant(plain_operators=operators_named("rms_norm"), needs_kernels=True),
    "rope": Variant(plain_operators=("rope",), needs_kernels=True),
    "swiglu": Variant(plain_operators=operators_named("swiglu"), needs_kernels=True),
    "fused-loss": Variant(plain_operators=("linear_cross_entropy",), needs_kernels=True),
    "kernels": Variant(with_training(kernels="reference"), needs_kernels=True),
    # PyTorch's own kernel, which needs no extra package.
    "attention": Variant(
        with_training(attention="flash" if has_gpu() else "reference"), needs_kernels=True
    ),
    "recomputing": Variant(with_training(save_projection_inputs=True), needs_kernels=True),
    "compile": Variant(with_training(compile=False)),
    "prefetch": Variant(without_prefetch),
    "kept-parameters": Variant(with_resharding),
}
"""Variants by the name of the optimisation that is off."""


def order(without: Sequence[str], rounds: int) -> list[str | None]:
    """Order of the runs; None is the full run."""
    names: list[str | None] = [None]
    for _ in range(rounds):
        for first in range(0, len(without), VARIANTS_BETWEEN_FULL_RUNS):
            names += [*without[first : first + VARIANTS_BETWEEN_FULL_RUNS], None]
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
    """Train with everything on, and with each of `without` off. See `throughput.measure`.

    All runs use the batch size of `config`, so that only one thing changes at a time.
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
        if variant.needs_kernels and not has_gpu():
            run = replace(
                run, details=f"{run.details}; on a CPU the full run uses the same operators"
            )
        finished(run)
        runs.append(run)
    return runs


@dataclass(frozen=True)
class Effect:
    """Effect of a variant on tokens/s."""

    ratio: float
    """tokens/s of the variant over tokens/s of the neighbouring full runs; median over rounds."""
    low: float
    """Lowest ratio within the spreads of the updates, over all rounds."""
    high: float
    """Highest ratio within the spreads."""

    @property
    def verdict(self) -> str:
        """Whether the optimisation that is off helps or hurts."""
        if self.high < 1 - NOISE:
            return "helps"
        return "hurts" if self.low > 1 + NOISE else "within noise"


def extent(spread: Spread) -> tuple[float, float]:
    """Interquartile range, widened by its own width on both sides: nearly all of a quiet run.

    On a shared machine the interquartile ranges of two runs of the same code often do not overlap.
    """
    width = spread.high / spread.low
    return spread.low / width, spread.high * width


def effect(runs: Sequence[TrainingRun], contender: str) -> Effect | None:
    """Effect of `contender`, from `runs` in order; None if it or its full runs have no time."""
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
    """One row per variant, after the full run."""
    shown = Table("without", "tok/s", "tok/s over full", "range", "peak GB", "verdict", title=title)
    full = next(run for run in runs if run.contender == FULL)
    for contender in dict.fromkeys(run.contender for run in runs):
        run = next(run for run in runs if run.contender == contender)
        found = None if contender == FULL else effect(runs, contender)
        change = None
        if run.peak_bytes is not None and full.peak_bytes is not None and contender != FULL:
            change = run.peak_bytes - full.peak_bytes
        shown_verdict = found.verdict if found and verdict(run) == "valid" else verdict(run)
        shown.add_row(
            contender.removeprefix(f"{FULL} without "),
            number(run.tok_per_s, ",.0f"),
            number(found.ratio if found else None, ".3f"),
            f"{found.low:.3f} to {found.high:.3f}" if found else "-",
            number(run.peak_bytes, ".2f", unit=1e9)
            + ("" if change is None else f" ({number(change, '+.2f', unit=1e9)})"),
            shown_verdict,
        )
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    exit_on_sigterm()
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
        help="default: llama-1b; on a CPU a shrunken quickstart",
    )
    # On a CPU compilation takes longer than the rest of a rehearsal.
    default_variants = [name for name in VARIANTS if on_gpu or name != "compile"]
    parser.add_argument(
        "--without",
        metavar="NAME",
        nargs="+",
        choices=VARIANTS,
        default=default_variants,
        help=f"any of {', '.join(VARIANTS)}; default: all, on a CPU without compile",
    )
    parser.add_argument(
        "--rounds", metavar="N", type=int, default=1, help="runs per variant; default: 1"
    )
    parser.add_argument(
        "--seconds",
        metavar="S",
        type=float,
        default=20.0 if on_gpu else 2.0,
        help="seconds of timed updates, at least three updates; default: %(default)s",
    )
    parser.add_argument(
        "--batch-size",
        metavar="N",
        type=int,
        help="sequences per micro-batch; default: from the recipe",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="results folder; default: benchmarks/results/<device>",
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
                rates=known_rates(),
                folder=Path(folder),
                finished=finished,
            )
    except ValueError as error:
        parser.error(str(error))
    title = f"{options.recipe.stem} on {conditions.device}, one optimisation off at a time"
    console.print(table(title if on_gpu else f"{title}\n{REHEARSAL_TITLE}", runs))


if __name__ == "__main__":
    main()
