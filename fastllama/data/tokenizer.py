"""Byte-level BPE tokenizers: training, storing, loading, and what the data needs to know of one."""

import hashlib
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from fastllama.atomic import write_atomic

SPECIAL_TOKENS = ("<SOS>", "<EOS>", "<PAD>", "<UNK>")
END_TOKENS = ("<EOS>", "<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>")
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256


def train_tokenizer(texts: Iterable[str], vocab_size: int = 8192) -> Tokenizer:
    """Train a byte-level BPE tokenizer; `SPECIAL_TOKENS` get the ids 0 to 3.

    The vocabulary is smaller than `vocab_size` when `texts` have too few pairs left to merge.
    Raises ValueError when `vocab_size` cannot hold the special tokens and the 256 bytes.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"vocabulary size {vocab_size} is too small: {len(SPECIAL_TOKENS)} special tokens and "
            f"256 bytes need at least {SMALLEST_VOCABULARY}"
        )
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _encode_plainly(tokenizer)


def refuse_output(path: Path) -> None:
    """Raise ValueError where `save_tokenizer` could not write `path`, before the work is done."""
    if path.is_dir():
        raise ValueError(f"output {path} is a folder: name a file in it, {path / 'tokenizer.json'}")
    if path.exists() and not path.is_file():
        raise ValueError(f"output {path} is not a file: choose another --output")
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
        raise ValueError(
            f"output {path} cannot be written, as {nearest} is no folder to write in: "
            "choose another --output"
        )


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write `tokenizer` as a `tokenizer.json`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, tokenizer.to_str(pretty=True))


def load_tokenizer(path: Path) -> Tokenizer:
    """Read any `tokenizer.json` of the Hugging Face library.

    Raises ValueError when the file is missing, is not JSON, or is not a tokenizer.
    """
    try:
        content = path.read_text(encoding="utf-8")
        json.loads(content)
    except FileNotFoundError:
        raise ValueError(
            f"tokenizer {path} does not exist: train one with `fastllama tokenizer train`"
        ) from None
    except IsADirectoryError:
        raise ValueError(f"tokenizer {path} is a folder: name its tokenizer.json") from None
    except ValueError as error:
        raise ValueError(
            f"tokenizer {path} is not JSON ({error}): name a Hugging Face tokenizer.json"
        ) from error
    try:
        tokenizer = Tokenizer.from_str(content)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(
            f"{path} is not a tokenizer ({error}): name a Hugging Face tokenizer.json"
        ) from error
    return _encode_plainly(tokenizer)


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """The number of rows an embedding needs: the largest id plus one, gaps between ids included."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 (hex) of what decides the ids of a text, whatever the formatting of its file."""
    content = json.loads(tokenizer.to_str())
    del content["truncation"], content["padding"]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def end_token_id(tokenizer: Tokenizer, end_token: str | None = None) -> int:
    """The id that ends a document: that of `end_token`, else of the first known name it has.

    Raises ValueError when `end_token`, or without it every name in `END_TOKENS`, is none of the
    tokenizer's special tokens.
    """
    # An ordinary entry would end a document wherever the text holds it.
    added = tokenizer.get_added_tokens_decoder()
    special = {token.content: number for number, token in sorted(added.items()) if token.special}
    for name in END_TOKENS if end_token is None else (end_token,):
        if name in special:
            return special[name]
    known = ", ".join(special) or "none"
    if end_token is not None:
        raise ValueError(
            f"end token {end_token!r} is no special token of the tokenizer: "
            f"give --end-token one of those it has ({known})"
        )
    raise ValueError(
        f"none of the usual end tokens ({', '.join(END_TOKENS)}) is a special token of the "
        f"tokenizer: name its own with --end-token, one of {known}"
    )


def verify_round_trip(tokenizer: Tokenizer, texts: Iterable[str]) -> None:
    """Raise ValueError with an excerpt of the first text that decoding does not give back."""
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if tokenizer.decode(ids, skip_special_tokens=False) != text:
            raise ValueError(
                f"the tokenizer does not give back the text {text[:80]!r}: "
                "train another one on text like it, or use a byte-level one"
            )


def _encode_plainly(tokenizer: Tokenizer) -> Tokenizer:
    """Make `tokenizer` encode all of a text, and a special token's name inside it as text.

    None of these settings survives in a file as needed: a document that mentions `<EOS>` would
    end early, and a tokenizer saved for inference may cut long documents.
    """
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
