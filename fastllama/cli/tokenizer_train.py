"""`fastllama tokenizer train`."""

import shlex
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fastllama.cli.command import Command
from fastllama.cli.parsing import parse
from fastllama.cli.streams import say
from fastllama.data.records import MAX_DOCUMENT_MB

# Texts that a tokenizer must decode to the same bytes before it is saved.
ROUND_TRIPS = (
    "def f(x):\n\treturn x  # 3.14\r\n",
    "naïve façade",
    "日本語 한국어 العربية",
    "🦙\u200d🔥",
    "<EOS>",
)


@dataclass(frozen=True)
class TokenizerTrainOptions:
    """Learn a byte-level BPE vocabulary from text and write it as tokenizer.json."""

    input: tuple[str, ...]
    """Files, folders or globs of .txt, .jsonl, .json and .parquet (.gz, .zst, .bz2, .xz too), or
    their URLs: s3://, gs://, hf://, https:// and others. Also data sets of the Hugging Face hub:
    'hub://OWNER/NAME?config=NAME&split=NAME'."""
    output: Path = Path("tokenizer.json")
    """File to write; a tokenizer that it holds is replaced."""
    vocab_size: int = 8192
    """Size of the vocabulary, including four special tokens and 256 bytes."""
    field: str = "text"
    """Name of the text field in JSON, Parquet and data sets of the hub."""
    max_document_mb: int = MAX_DOCUMENT_MB
    """Skip a record or text file of more than this many MB, and count it."""


def run(args: list[str]) -> None:
    """Train a tokenizer and print its size and fingerprint."""
    options = parse(TokenizerTrainOptions, args, "fastllama tokenizer train")
    from fastllama.data.accounting import Accounting
    from fastllama.data.documents import read_documents
    from fastllama.data.files import find_files
    from fastllama.data.tokenizer import (
        check_writable,
        fingerprint,
        save_tokenizer,
        train_tokenizer,
        verify_round_trip,
        vocabulary_size,
    )

    check_writable(options.output)
    files = find_files(options.input)
    report = partial(say, file=sys.stderr)
    if options.output.exists():
        report(f"note: the tokenizer {options.output} exists and will be replaced")
    records = read_documents(files.paths, options.field, max_document_mb=options.max_document_mb)
    accounting = Accounting(report)
    texts = (document.text for document in accounting.documents(records))
    tokenizer = train_tokenizer(texts, options.vocab_size)
    verify_round_trip(tokenizer, ROUND_TRIPS)
    save_tokenizer(tokenizer, options.output)
    for line in accounting.summary(files):
        report(line)
    size = vocabulary_size(tokenizer)
    few = "" if size == options.vocab_size else f" of {options.vocab_size} (the text has no more)"
    say(
        f"{options.output}: {size} entries{few}, fingerprint {fingerprint(tokenizer)[:12]}, "
        f"{accounting.counts.malformed:,} malformed records skipped"
    )
    tokenizer_json = shlex.quote(str(options.output))
    say(f"next: fastllama prepare --input … --tokenizer {tokenizer_json} --output data/NAME")


COMMAND = Command(
    run,
    {"--input PATH… --output tokenizer.json": "learn a byte-level BPE vocabulary from text"},
)
