"""`fastllama prepare`."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from fastllama.cli.command import Command
from fastllama.cli.parsing import parse
from fastllama.cli.streams import say
from fastllama.data.records import MAX_DOCUMENT_MB


@dataclass(frozen=True)
class PrepareOptions:
    """Encode documents into token shards. Run again after an interruption, it resumes."""

    input: tuple[str, ...]
    """Files, folders or globs of .txt, .jsonl, .json and .parquet (.gz, .zst, .bz2, .xz too)."""
    tokenizer: Path
    """The tokenizer.json to encode with; any Hugging Face tokenizer works."""
    output: Path
    """Folder to write, data/NAME."""
    field: str = "text"
    """Name of the text field in JSON and Parquet."""
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


def run(args: list[str]) -> None:
    """Prepare a data folder and print the tokens of each split."""
    options = parse(PrepareOptions, args, "fastllama prepare")
    from fastllama.data.prepare import prepare

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
    )
    for name, split in manifest.splits.items():
        say(f"{options.output} {name}: {split.tokens:,} tokens in {split.documents:,} documents")
    say(f"next: fastllama train CONFIG.toml --data.path {shlex.quote(str(options.output))}")


COMMAND = Command(
    run,
    {
        "--input PATH… --tokenizer tokenizer.json --output data/NAME": (
            "encode documents into token shards"
        )
    },
)
