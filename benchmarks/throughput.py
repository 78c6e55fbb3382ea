"""Tokens per second of fastllama and of others that train the same model on the same tokens.

    python benchmarks/throughput.py [RECIPE.toml ...] [--contenders NAME ...] [--seconds S]
        [--batch-size auto|N] [--tokens-per-update N] [--data DIR] [--out DIR]

Every contender trains in a process of its own, one at a time, from the same initial weights. With
`--batch-size auto` each looks for its best micro-batch, all by the same procedure: from the
recipe's it halves while memory does not suffice, else doubles while the rate rises. A row is void
where the losses are not those of the plain model. Rows are added to the results as they come. On a
CPU a shrunken recipe rehearses all of it.
"""

import argparse
import importlib.util
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
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
from benchmarks.training.row import assumed_rates, baseline, parity, training_run, verdict
from benchmarks.training.workload import rehearsal, with_synthetic_data, workload
from fastllama.config import Config, load_recipe, validate
from fastllama.data.dataset import open_dataset
from fastllama.planning.bound import Rates

ROOT = Path(__file__).parents[1]
GPU_RECIPES = [ROOT / "configs" / "llama-1b.toml", ROOT / "configs" / "llama-100m.toml"]
REHEARSED_RECIPES = [ROOT / "configs" / "quickstart.toml"]
REHEARSAL_TITLE = "CPU rehearsal: shows that the measuring works, says nothing of speed"
WHOLE_MODEL_WEIGHT = 1.5
"""Share of the time of one that compiles a whole model, where another has a share of 1."""


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
) -> list[TrainingRun]:
    """Train `config` with each contender.

    They run in the order of CONTENDERS, so that the plain models judge fastllama and not the other
    way round.

    Args:
        config: as loaded from the recipe.
        recipe: its name in the rows.
        contenders: names in CONTENDERS.
        seconds: of steady state, at least three updates.
        batch_size: sequences of a micro-batch, halved where memory does not suffice; None means
            that each contender looks for its best.
        tokens_per_update: of every contender.
        deadline: a moment of `time.time()` by which all are done; what is left until then is
            divided among those still to run. One that has measured an update hands back what it
            has in time; one that has not is stopped.
        rates: of the device, for the bound.
        folder: an empty one, for what the children read and write.
        finished: called with each row as soon as it is there.
        data: a prepared folder to train on; None means synthetic tokens.

    Raises:
        ValueError: the batch does not divide the update, or `data` does not fit the model.
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
        size, outcome = child.train(config, search=batch_size is None)
        run = training_run(name, recipe, with_batch_size(config, size), outcome, rates)
        runs.append(replace(run, parity=parity(run, baseline(runs))))
        finished(runs[-1])
    return runs


def _weight(contender: str) -> float:
    return WHOLE_MODEL_WEIGHT if CONTENDERS[contender].compiles else 1.0


def unsupported_reason(contender: str) -> str | None:
    """One sentence why `contender` cannot run here, or None."""
    needs = CONTENDERS[contender]
    missing = [pip for name, pip in needs.packages.items() if not importlib.util.find_spec(name)]
    if missing:
        return f"{contender} is skipped: pip install {' '.join(missing)} brings what it needs."
    if needs.needs_gpu and not has_gpu():
        return f"{contender} is skipped: it needs a CUDA GPU."
    return None


def table(title: str, runs: Sequence[TrainingRun]) -> Table:
    """The runs of one recipe, a row each."""
    columns = ["contender", "batch", "tok/s", "25-75 %", "MFU causal / PaLM", "HFU", "of H"]
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
    """Contenders do as many updates as the time allows, so the last losses do not compare."""
    return f"{losses[0]:.3f} to {losses[-1]:.3f} in {len(losses)}" if losses else "-"


def number(value: float | None, form: str, unit: float = 1.0) -> str:
    """A cell of a table; a dash for what is not known."""
    return "-" if value is None else format(value / unit, form)


def report(run: TrainingRun, console: Console) -> None:
    """Print that a run has ended, and what is wrong with it."""
    why = f" ({run.failure or run.parity})" if verdict(run) != "valid" else ""
    line = f"{run.recipe}: {run.contender} is {verdict(run)}{why}"
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def open_console() -> Console:
    """One that leaves tables whole where the output is a file."""
    return Console(width=None if sys.stdout.isatty() else 160)


def ratios(runs: Sequence[TrainingRun]) -> list[str]:
    """Lines that compare fastllama with each peer, where both rows count."""
    rates = {run.contender: run.tok_per_s for run in runs if verdict(run) == "valid"}
    own = rates.pop("fastllama", None)
    if own is None:
        return []
    return [f"fastllama / {peer}: {own / rate:.2f}" for peer, rate in rates.items() if rate]


def parse_batch_size(text: str) -> int | None:
    """`auto` is None."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a number from 1")
    return int(text)


def exit_when_terminated() -> None:
    """Have SIGTERM unwind this process, so that the child it waits for is not left behind."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)


def main(arguments: Sequence[str] | None = None) -> None:
    exit_when_terminated()
    on_gpu = has_gpu()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "recipes",
        nargs="*",
        type=Path,
        metavar="RECIPE.toml",
        help="default: the 1B and the 100M; on a CPU the quickstart, shrunk",
    )
    parser.add_argument(
        "--contenders",
        nargs="+",
        metavar="NAME",
        help=f"of {', '.join(CONTENDERS)}; default: all that can run here",
    )
    parser.add_argument(
        "--seconds",
        metavar="S",
        type=float,
        default=20.0 if on_gpu else 2.0,
        help="of steady state, at least three updates; now %(default)s",
    )
    parser.add_argument(
        "--batch-size",
        metavar="N",
        type=parse_batch_size,
        help="sequences of a micro-batch, halved where they do not fit; default: auto",
    )
    parser.add_argument("--tokens-per-update", metavar="N", type=int, help="default: the recipe's")
    parser.add_argument(
        "--data", metavar="DIR", type=Path, help="a prepared folder in place of synthetic tokens"
    )
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help="folder of results; default: one by device"
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
                    rates=assumed_rates(),
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
    """Those that can run here of the ones asked for; on a CPU, unasked, none that compiles.

    Raises:
        ValueError: an unknown name, or none that can run.
    """
    unknown = sorted(set(asked_for or ()) - CONTENDERS.keys())
    if unknown:
        raise ValueError(f"there is no contender {unknown[0]!r}; choose of {', '.join(CONTENDERS)}")
    names = asked_for or [
        name for name, contender in CONTENDERS.items() if has_gpu() or not contender.compiles
    ]
    unsupported_reasons = {name: unsupported_reason(name) for name in names}
    for sentence in filter(None, unsupported_reasons.values()):
        console.print(sentence, highlight=False)
    able = [name for name in names if unsupported_reasons[name] is None]
    if not able:
        raise ValueError("none of the contenders asked for can run here; add fastllama")
    return able


if __name__ == "__main__":
    main()
