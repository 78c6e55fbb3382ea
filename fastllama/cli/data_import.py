"""`fastllama data import`."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastllama.cli.command import Command
from fastllama.cli.parsing import parse
from fastllama.cli.streams import say


@dataclass(frozen=True)
class DataImportOptions:
    """Copy token files of other tools into a data folder, without encoding text again.

    Reads files of datatrove, Megatron-LM, llm.c, modded-nanogpt and nanoGPT, and .npy arrays.
    """

    input: tuple[str, ...]
    """Files, folders or globs of .ds, .bin and .npy; an index is found beside its file."""
    tokenizer: Path
    """The tokenizer.json that the files were written with."""
    output: Path
    """Folder to write, data/NAME."""
    validation_input: tuple[str, ...] = ()
    """Files that are the validation split; --input may hold them, too."""
    validation_fraction: float = 0.0
    """Fraction of the documents held out for validation, where no file is."""
    format: Literal["auto", "datatrove", "megatron", "llm.c", "raw-uint16", "raw-uint32", "npy"] = (
        "auto"
    )
    """Format of the files; auto tells it by their content and suffix."""
    end_token: str | None = None
    """Special token that ends each document; None means the tokenizer's own."""
    shard_tokens: int = 100_000_000
    """Tokens per shard."""


def run(args: list[str]) -> None:
    """Import token files and print the tokens of each split."""
    options = parse(DataImportOptions, args, "fastllama data import")
    from fastllama.data.import_tokens import import_tokens

    manifest = import_tokens(
        options.input,
        options.tokenizer,
        options.output,
        validation_inputs=options.validation_input,
        validation_fraction=options.validation_fraction,
        shard_tokens=options.shard_tokens,
        end_token=options.end_token,
        named_format=None if options.format == "auto" else options.format,
    )
    for name, split in manifest.splits.items():
        say(f"{options.output} {name}: {split.tokens:,} tokens in {split.documents:,} documents")
    say(f"next: fastllama train CONFIG.toml --data.path {shlex.quote(str(options.output))}")


COMMAND = Command(
    run,
    {
        "--input PATH… --tokenizer tokenizer.json --output data/NAME": (
            "copy token files of other tools into a data folder"
        )
    },
)
