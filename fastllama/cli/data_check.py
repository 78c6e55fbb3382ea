"""`fastllama data check`."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from fastllama.cli.command import Command
from fastllama.cli.parsing import parse


@dataclass(frozen=True)
class DataCheckOptions:
    """Check every shard of a data folder: checksum, size, dtype and token ids."""

    folder: tyro.conf.Positional[Path]
    """Folder written by fastllama prepare."""


def run(args: list[str]) -> None:
    """Check a data folder and print its number of tokens."""
    options = parse(DataCheckOptions, args, "fastllama data check")
    from fastllama.data.manifest import Manifest

    manifest = Manifest.load(options.folder)
    manifest.check_contents(options.folder)
    tokens = sum(split.tokens for split in manifest.splits.values())
    print(f"{options.folder}: {tokens:,} tokens, every shard matches its checksum")


COMMAND = Command(run, {"data/NAME": "check every shard against its checksum"})
