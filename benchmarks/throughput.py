"""Training speed of fastllama and of its peers, on the same model and the same tokens.

    python benchmarks/throughput.py [RECIPE.toml ...] [--contenders NAME ...] [--seconds S]
        [--batch-size auto|N] [--tokens-per-update N] [--data DIR] [--out DIR]

Each contender trains in its own process, one at a time, from the same initial weights. With
`--batch-size auto` each contender searches for its best micro-batch size by the same procedure:
starting from the recipe's size, halve while out of memory, otherwise double while tokens/s improve.
A row is void if its losses do not match the plain model. Each row is saved as soon as it is
measured. On a CPU the same code runs with a shrunken recipe, as a rehearsal.
"""

import argparse
import importlib.util
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.table import Table

from benchmarks import results
from benchmarks.conditions import current_conditions, has_gpu, results_name
from benchmarks.results import TrainingRun
from benchmarks.training.child import Child, with_batch_size
from benchmarks.training.contenders import CONTENDERS
from benchmarks.training.row import baseline, known_rates, parity, training_run, verdict
from benchmarks.training.workload import rehearsal, with_synthetic_data, workload
from fastllama.config import Config, load_recipe, validate
from fastllama.data.dataset import open_dataset
from fastllama.planning.bound import Rates

ROOT = Path(__file__).parents[1]
GPU_RECIPES = [ROOT / "configs" / "llama-1b.toml", ROOT / "configs" / "llama-100m.toml"]
REHEARSED_RECIPES = [ROOT / "configs" / "quickstart.toml"]
REHEARSAL_TITLE = "CPU rehearsal: tests the benchmark code, does not measure speed"
WHOLE_MODEL_WEIGHT = 1.5
"""Share of the remaining time for a contender that compiles a whole model; others have 1."""


def measure(
    config: Config,
    recipe: str,
    contenders: Sequence[str],
    *,
    seconds: float,
    batch_size: int | None,
    tokens_per_update: int,
    deadline: float | None,
    rates: Rates | None,
    folder: Path,
    finished: Callable[[TrainingRun], None],
    data: Path | None = None,
    batch_sizes: Mapping[str, int] | None = None,
) -> list[TrainingRun]:
    """Train `config` with each contender.

    Contenders run in the order of CONTENDERS, so that the plain models are the baseline for the
    losses of fastllama.

    Args:
        config: the recipe as loaded.
        recipe: name of the recipe in the rows.
        contenders: names in CONTENDERS.
        seconds: duration of the timed updates, of which there are at least three.
        batch_size: sequences per micro-batch, halved while out of memory; None means that each
            contender searches for its best size.
        tokens_per_update: tokens per update, the same for every contender.
        deadline: `time.time()` by which all contenders must finish. The remaining time is divided
            among the remaining contenders. Close to its deadline a contender returns the updates
            it has timed; one without a timed update is stopped.
        rates: rates of the device, for the bound.
        folder: an empty folder for the files of the child processes.
        finished: called with each row as soon as it is measured.
        data: a prepared data folder; None means synthetic tokens.
        batch_sizes: `batch_size` of single contenders, which need more memory than the others.

    Raises:
        ValueError: the micro-batch does not divide the update, or `data` does not fit the model.
    """
    config = workload(config, tokens_per_update)
    if batch_size is not None:
        config = with_batch_size(config, batch_size)
    validate(config)
    if data is None:
        config = with_synthetic_data(config, folder / "data")
    else:
        config = replace(config, data=replace(config.data, path=str(data.resolve())))
        open_dataset(config)
    runs: list[TrainingRun] = []
    in_order = [name for name in CONTENDERS if name in contenders]
    for number, name in enumerate(in_order):
        own_deadline = None
        if deadline is not None:
            left = deadline - time.time()
            if left <= 0:
                break
            weights = [_weight(other) for other in in_order[number:]]
            own_deadline = time.time() + left * weights[0] / sum(weights)
        child = Child(name, folder, seconds, own_deadline)
        own = config
        if batch_sizes and name in batch_sizes:
            own = with_batch_size(config, batch_sizes[name])
        size, outcome = child.train(own, search=batch_size is None)
        run = training_run(name, recipe, with_batch_size(config, size), outcome, rates)
        runs.append(replace(run, parity=parity(run, baseline(runs))))
        finished(runs[-1])
    return runs


def _weight(contender: str) -> float:
    return WHOLE_MODEL_WEIGHT if CONTENDERS[contender].compiles else 1.0


def unsupported_reason(contender: str) -> str | None:
    """Why `contender` cannot run here, in one sentence, or None."""
    needs = CONTENDERS[contender]
    missing = [pip for name, pip in needs.packages.items() if not importlib.util.find_spec(name)]
    if missing:
        return f"{contender} is skipped: it needs pip install {' '.join(missing)}."
    if needs.needs_gpu and not has_gpu():
        return f"{contender} is skipped: it needs a CUDA GPU."
    return None


def table(title: str, runs: Sequence[TrainingRun]) -> Table:
    """Table of the runs of one recipe."""
    columns = ["contender", "batch", "tok/s", "25-75 %", "MFU causal / PaLM", "HFU", "% of H"]
    columns += ["peak GB", "s to first", "loss", "verdict"]
    shown = Table(*columns, title=title)
    for run in runs:
        spread, tokens = run.seconds_per_update, run.tokens_per_update
        shown.add_row(
            run.contender,
            str(run.batch_size),
            number(run.tok_per_s, ",.0f"),
            f"{tokens / spread.high:,.0f} to {tokens / spread.low:,.0f}" if spread else "-",
            f"{number(run.mfu_causal, '.1%')} / {number(run.mfu_palm, '.1%')}",
            number(run.hfu, ".1%"),
            number(run.share_of_bound, ".1%"),
            number(run.peak_bytes, ".1f", unit=1e9),
            number(run.seconds_to_first_update, ".1f"),
            loss_curve(run.losses),
            verdict(run),
        )
    return shown


def loss_curve(losses: Sequence[float]) -> str:
    """First and last loss, and the number of updates, which differs between contenders."""
    return f"{losses[0]:.3f} to {losses[-1]:.3f} in {len(losses)}" if losses else "-"


def number(value: float | None, form: str, unit: float = 1.0) -> str:
    """A table cell; a dash for None."""
    return "-" if value is None else format(value / unit, form)


def report(run: TrainingRun, console: Console) -> None:
    """Print the verdict of a finished run, with its reason if it is not valid."""
    why = f" ({run.failure or run.parity})" if verdict(run) != "valid" else ""
    line = f"{run.recipe}: {run.contender} is {verdict(run)}{why}"
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def open_console() -> Console:
    """Console that does not wrap tables at 80 columns when the output is a file."""
    return Console(width=None if sys.stdout.isatty() else 160)


def ratios(runs: Sequence[TrainingRun]) -> list[str]:
    """One line per peer with the ratio of tokens/s, for valid rows only."""
    rates = {run.contender: run.tok_per_s for run in runs if verdict(run) == "valid"}
    own = rates.pop("fastllama", None)
    if own is None:
        return []
    return [f"fastllama / {peer}: {own / rate:.2f}" for peer, rate in rates.items() if rate]


def parse_batch_size(text: str) -> int | None:
    """Parse a positive number; `auto` gives None."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a positive integer")
    return int(text)


def exit_on_sigterm() -> None:
    """Turn SIGTERM into SystemExit, so that `finally` blocks kill the running child process."""

    def exit_process(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, exit_process)


def main(arguments: Sequence[str] | None = None) -> None:
    exit_on_sigterm()
    on_gpu = has_gpu()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "recipes",
        nargs="*",
        type=Path,
        metavar="RECIPE.toml",
        help="default: llama-1b and llama-100m; on a CPU a shrunken quickstart",
    )
    parser.add_argument(
        "--contenders",
        nargs="+",
        metavar="NAME",
        help=f"any of {', '.join(CONTENDERS)}; default: all that can run here",
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
        type=parse_batch_size,
        help="sequences per micro-batch, halved while out of memory; default: auto",
    )
    parser.add_argument(
        "--tokens-per-update", metavar="N", type=int, help="default: from the recipe"
    )
    parser.add_argument(
        "--data", metavar="DIR", type=Path, help="prepared data folder; default: synthetic tokens"
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="results folder; default: benchmarks/results/<device>",
    )
    options = parser.parse_args(arguments)
    console = open_console()
    conditions = current_conditions()
    out = options.out or results.RESULTS / results_name(conditions)

    def finished(run: TrainingRun) -> None:
        results.append(out, conditions, [run])
        report(run, console)

    try:
        contenders = chosen_contenders(options.contenders, console)
        for recipe in options.recipes or (GPU_RECIPES if on_gpu else REHEARSED_RECIPES):
            config = load_recipe(recipe)
            if not on_gpu:
                config = rehearsal(config)
            tokens_per_update = options.tokens_per_update
            if tokens_per_update is None:
                tokens_per_update = config.training.tokens_per_update
            with tempfile.TemporaryDirectory() as folder:
                runs = measure(
                    config,
                    recipe.stem if on_gpu else f"{recipe.stem}, shrunk",
                    contenders,
                    seconds=options.seconds,
                    batch_size=options.batch_size,
                    tokens_per_update=tokens_per_update,
                    deadline=None,
                    rates=known_rates(),
                    folder=Path(folder),
                    finished=finished,
                    data=options.data,
                )
            title = f"{recipe.stem} on {conditions.device}"
            console.print(table(title if on_gpu else f"{title}\n{REHEARSAL_TITLE}", runs))
            for line in ratios(runs):
                console.print(line, highlight=False)
    except ValueError as error:
        parser.error(str(error))


def chosen_contenders(asked_for: Sequence[str] | None, console: Console) -> list[str]:
    """Requested contenders that can run here; prints why the others are skipped.

    The default is all contenders, on a CPU without those that compile.

    Raises:
        ValueError: a name is unknown, or no contender can run.
    """
    unknown = sorted(set(asked_for or ()) - CONTENDERS.keys())
    if unknown:
        raise ValueError(f"unknown contender {unknown[0]!r}; choose from {', '.join(CONTENDERS)}")
    names = asked_for or [
        name for name, contender in CONTENDERS.items() if has_gpu() or not contender.compiles
    ]
    unsupported_reasons = {name: unsupported_reason(name) for name in names}
    for sentence in filter(None, unsupported_reasons.values()):
        console.print(sentence, highlight=False)
    able = [name for name in names if unsupported_reasons[name] is None]
    if not able:
        raise ValueError("none of the given contenders can run here; add fastllama")
    return able


if __name__ == "__main__":
    main()
