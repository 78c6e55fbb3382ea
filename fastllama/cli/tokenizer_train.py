"""`fastllama tokenizer train`."""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fastllama.cli.command import Command
from fastllama.cli.parsing import parse

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
    """Files, folders or globs of .txt, .jsonl and .parquet (.gz and .zst too)."""
    output: Path = Path("tokenizer.json")
    """File to write."""
    vocab_size: int = 8192
    """Size of the vocabulary, including four special tokens and 256 bytes."""
    field: str = "text"
    """Name of the text field in JSON Lines and Parquet."""


def run(args: list[str]) -> None:
    """Train a tokenizer and print its size and fingerprint."""
    options = parse(TokenizerTrainOptions, args, "fastllama tokenizer train")
    from fastllama.data.documents import MalformedFilter, find_files, read_documents
    from fastllama.data.tokenizer import (
        check_writable,
        fingerprint,
        save_tokenizer,
        train_tokenizer,
        verify_round_trip,
        vocabulary_size,
    )

    check_writable(options.output)
    records = read_documents(find_files(options.input), options.field)
    malformed = MalformedFilter(report=partial(print, file=sys.stderr))
    texts = (document.text for document in malformed.documents(records))
    tokenizer = train_tokenizer(texts, options.vocab_size)
    verify_round_trip(tokenizer, ROUND_TRIPS)
    save_tokenizer(tokenizer, options.output)
    size = vocabulary_size(tokenizer)
    few = "" if size == options.vocab_size else f" of {options.vocab_size} (the text has no more)"
    print(
        f"{options.output}: {size} entries{few}, fingerprint {fingerprint(tokenizer)[:12]}, "
        f"{malformed.count:,} malformed records skipped"
    )
    print(f"next: fastllama prepare --input … --tokenizer {options.output} --output data/NAME")


COMMAND = Command(
    run,
    {"--input PATH… --output tokenizer.json": "learn a byte-level BPE vocabulary from text"},
)
