"""`fastllama data check`."""

from dataclasses import dataclass

import tyro

from fastllama.cli.command import Command
from fastllama.cli.parsing import parse
from fastllama.cli.streams import say


@dataclass(frozen=True)
class DataCheckOptions:
    """Check a data folder: its manifest, its tokenizer, and checksum and token ids of each shard.

    Also finds shards that the manifest does not list, and counts the documents again.
    """

    folder: tyro.conf.Positional[str]
    """Folder written by fastllama prepare, or its URL."""


def run(args: list[str]) -> None:
    """Check a data folder and print its number of tokens."""
    options = parse(DataCheckOptions, args, "fastllama data check")
    from fastllama.data.dataset import open_folder

    folder, manifest = open_folder(options.folder)
    manifest.check_contents(folder)
    tokens = sum(split.tokens for split in manifest.splits.values())
    say(f"{folder}: {tokens:,} tokens, every shard matches its checksum")
    if not manifest.is_checksummed:
        say(
            "manifest.json has no checksum, because an older fastllama wrote it: its numbers of "
            "text bytes and skipped records are unverified"
        )


COMMAND = Command(run, {"data/NAME": "check every file of a data folder against its manifest"})
