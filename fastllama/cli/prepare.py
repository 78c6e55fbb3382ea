"""`fastllama prepare`."""

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from fastllama.cli.command import Command
from fastllama.cli.parsing import parse
from fastllama.cli.streams import say
from fastllama.data.records import MAX_DOCUMENT_MB


@dataclass(frozen=True)
class PrepareOptions:
    """Encode documents into token shards. Run again after an interruption, it resumes.

    Several machines share the work with --part: `fastllama data join` makes one data folder of all
    parts.
    """

    input: tuple[str, ...]
    """Files, folders or globs of .txt, .jsonl, .json and .parquet (.gz, .zst, .bz2, .xz too), or
    their URLs: s3://, gs://, hf://, https:// and others. Also data sets of the Hugging Face hub:
    'hub://OWNER/NAME?config=NAME&split=NAME'."""
    tokenizer: Path
    """The tokenizer.json to encode with; any Hugging Face tokenizer works."""
    output: Path
    """Folder to write, data/NAME."""
    field: str = "text"
    """Name of the text field in JSON, Parquet and data sets of the hub."""
    max_document_mb: int = MAX_DOCUMENT_MB
    """Skip a record or text file of more than this many MB, and count it."""
    validation_fraction: float = 0.0
    """Fraction of the documents held out for validation."""
    shard_tokens: int = 100_000_000
    """Tokens per shard."""
    end_token: str | None = None
    """Special token that ends each document; None means the tokenizer's own."""
    strict: bool = False
    """Stop at the first malformed record, or text that the tokenizer would lose."""
    workers: int | None = None
    """Encoding threads; None means one per core."""
    part: str | None = None
    """Encode part I of N, such as 2/16; None means the task of a SLURM array, or all files."""


def run(args: list[str]) -> None:
    """Prepare a data folder and print the tokens of each split."""
    options = parse(PrepareOptions, args, "fastllama prepare")
    from fastllama.data.manifest import MANIFEST_FILE
    from fastllama.data.parts import Part, part_of_array
    from fastllama.data.prepare import prepare

    part = part_of_array(os.environ) if options.part is None else Part.parse(options.part)
    if part is not None and options.part is None:
        say(f"part {part}, by the SLURM array of this task; --part chooses another")
    manifest = prepare(
        options.input,
        options.tokenizer,
        options.output,
        field=options.field,
        max_document_mb=options.max_document_mb,
        validation_fraction=options.validation_fraction,
        shard_tokens=options.shard_tokens,
        end_token=options.end_token,
        strict=options.strict,
        workers=options.workers,
        part=part,
    )
    folder = options.output if part is None else options.output / part.folder
    for name, split in manifest.splits.items():
        say(f"{folder} {name}: {split.tokens:,} tokens in {split.documents:,} documents")
    output = shlex.quote(str(options.output))
    if part is None:
        say(f"next: fastllama train CONFIG.toml --data.path {output}")
    elif not (options.output / MANIFEST_FILE).exists():
        say(f"next: fastllama data join {output}, when all {part.count:,} parts are complete")


COMMAND = Command(
    run,
    {
        "--input PATH… --tokenizer tokenizer.json --output data/NAME": (
            "encode documents into token shards; with --part I/N, on one of several machines"
        )
    },
)
