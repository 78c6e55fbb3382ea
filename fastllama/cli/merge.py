"""`fastllama merge`."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastllama.cli.command import Command
from fastllama.cli.parsing import parse
from fastllama.cli.streams import say


@dataclass(frozen=True)
class MergeOptions:
    """Average the weights of checkpoints of one run, or of its branches, into a new run folder."""

    checkpoints: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Checkpoints: runs/NAME/checkpoints/step-…, or runs/NAME for its newest."""
    output: Path
    """Run folder to write."""
    weights: tuple[float, ...] = ()
    """A number for each checkpoint, of which only the proportions matter; without, equal ones."""


def run(args: list[str]) -> None:
    """Write the average and print the share of each checkpoint."""
    options = parse(MergeOptions, args, "fastllama merge")
    from fastllama.weights.merging import merge

    shares = merge(options.checkpoints, options.output, options.weights)
    for path, share in zip(options.checkpoints, shares, strict=True):
        say(f"{100 * share:5.1f} % {path}")
    output = shlex.quote(str(options.output))
    say(f"merged {len(shares)} checkpoints into {options.output}")
    say(f"next: fastllama generate {output} --prompt TEXT")


COMMAND = Command(
    run,
    {"runs/NAME/checkpoints/step-… --output runs/MERGED": "average the weights of checkpoints"},
)
