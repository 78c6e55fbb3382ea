"""`fastllama tokenizer repair`."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from fastllama.cli.command import Command
from fastllama.cli.parsing import parse
from fastllama.cli.streams import say


@dataclass(frozen=True)
class TokenizerRepairOptions:
    """Give a tokenizer tokens for all bytes, so that it can represent every text.

    The new tokens follow all others. Every other id stays, and so does the encoding of text that
    the tokenizer could represent before. The vocabulary grows by the number of missing bytes.
    """

    tokenizer: Path
    """The tokenizer.json to repair: byte-level BPE, or another BPE or Unigram."""
    output: Path
    """File to write."""


def run(args: list[str]) -> None:
    """Write the repaired tokenizer and print its size and fingerprint."""
    options = parse(TokenizerRepairOptions, args, "fastllama tokenizer repair")
    from fastllama.data.tokenizer import (
        check_writable,
        fingerprint,
        load_tokenizer,
        save_tokenizer,
        vocabulary_size,
    )
    from fastllama.data.tokenizer_variants import repaired

    check_writable(options.output)
    tokenizer = load_tokenizer(options.tokenizer)
    try:
        complete = repaired(tokenizer)
    except ValueError as error:
        raise ValueError(f"tokenizer {options.tokenizer}: {error}") from None
    save_tokenizer(complete, options.output)
    before, after = vocabulary_size(tokenizer), vocabulary_size(complete)
    say(
        f"{options.output}: {after} entries, {after - before} of them new, "
        f"fingerprint {fingerprint(complete)[:12]}"
    )
    tokenizer_json = shlex.quote(str(options.output))
    say(f"next: fastllama prepare --input … --tokenizer {tokenizer_json} --output data/NAME")


COMMAND = Command(
    run,
    {"--tokenizer IN.json --output OUT.json": "give a tokenizer tokens for all bytes"},
)
