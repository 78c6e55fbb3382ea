"""`fastllama data join`."""

import shlex
from dataclasses import dataclass
from pathlib import Path

import tyro

from fastllama.cli.command import Command
from fastllama.cli.parsing import parse
from fastllama.cli.streams import say


@dataclass(frozen=True)
class DataJoinOptions:
    """Join the parts of fastllama prepare --part into one data folder.

    Checks that all parts are complete and were made by the same command. Writes one manifest; the
    shards stay where they are.
    """

    folder: tyro.conf.Positional[Path]
    """Folder of the parts, the --output of fastllama prepare --part."""


def run(args: list[str]) -> None:
    """Join the parts and print the tokens of each split."""
    options = parse(DataJoinOptions, args, "fastllama data join")
    from fastllama.data.join import join

    manifest = join(options.folder)
    for name, split in manifest.splits.items():
        say(f"{options.folder} {name}: {split.tokens:,} tokens in {split.documents:,} documents")
    say(f"next: fastllama train CONFIG.toml --data.path {shlex.quote(str(options.folder))}")


COMMAND = Command(run, {"data/NAME": "join the parts of prepare --part into one data folder"})
