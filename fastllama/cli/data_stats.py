"""`fastllama data stats`."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from fastllama.cli.command import Command
from fastllama.cli.parsing import parse
from fastllama.cli.streams import require_stdout, say


@dataclass(frozen=True)
class DataStatsOptions:
    """Show the size of each split, its compression, document lengths, and most common tokens."""

    folder: tyro.conf.Positional[str]
    """Folder written by fastllama prepare or fastllama data import, or its URL."""
    plot: Path | None = None
    """Also draw document lengths and token counts into this .png file."""
    json: bool = False
    """Print one JSON object instead of text."""


def run(args: list[str]) -> None:
    """Read a data folder once, and print its statistics."""
    options = parse(DataStatsOptions, args, "fastllama data stats")
    from fastllama.console import Console
    from fastllama.data.dataset import open_folder
    from fastllama.data.statistics import count_tokens, report, statistics
    from fastllama.data.statistics_plot import check_plot, plot_counts

    if options.plot is not None:
        check_plot(options.plot)
    folder, manifest = open_folder(options.folder)
    tokenizer = manifest.open_tokenizer(folder)
    counts = count_tokens(folder, manifest, Console(stderr=True))
    found = statistics(manifest, tokenizer, counts)
    if options.plot is not None:
        plot_counts(counts, options.plot)
    if options.json:
        say(json.dumps({name: asdict(split) for name, split in found.items()}, indent=2))
    else:
        for name, split in found.items():
            say("\n".join([f"{folder} {name}", *report(split)]))
    require_stdout()


COMMAND = Command(
    run, {"data/NAME": "show sizes, document lengths and common tokens of a data folder"}
)
