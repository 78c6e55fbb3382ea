"""Tokenizers: train a byte-level BPE, save, load, fingerprint, find the end token."""

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from fastllama.atomic import naming, write_atomic
from fastllama.console import ctrl_c_ends_process
from fastllama.data.pieces import Cutter
from fastllama.printable import one_line, printable
from fastllama.urls import is_url

SPECIAL_TOKENS = ("<SOS>", "<EOS>", "<PAD>", "<UNK>")
END_TOKENS = ("<EOS>", "<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>")
MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256
WORD_CHARACTERS = 512
"""Words up to this length are never cut for training. Longer ones are, into at most twice as many
characters, because a merge takes time in proportion to its word."""
# Python takes the separators 1C to 1F for spaces, the tokenizers library does not.
_SIGNS = re.compile(r"(?:[^\w\s]|[_\x1c-\x1f])+")
MAX_FILE_BYTES = 2**28
MAX_TOKEN_ID = 2**24
"""The tokenizers library writes a tokenizer in memory and time in proportion to the largest id."""
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def train_tokenizer(texts: Iterable[str], vocab_size: int = 8192) -> Tokenizer:
    """Train a byte-level BPE tokenizer. `SPECIAL_TOKENS` get the ids 0 to 3.

    The vocabulary is smaller than `vocab_size` if `texts` run out of pairs to merge. No token has
    more than twice `WORD_CHARACTERS`.

    Raises:
        ValueError: `vocab_size` cannot hold the special tokens and the 256 bytes.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocabulary size {vocab_size} is too small: {len(SPECIAL_TOKENS)} special tokens and "
            f"256 bytes need at least {MIN_VOCAB_SIZE}"
        )
    tokenizer = Tokenizer(BPE())
    words = tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    cutter = Cutter(lambda text: [word for word, _ in words.pre_tokenize_str(text)])
    pieces = (piece for text in texts for piece in cutter.pieces(text))
    parts = (part for piece in pieces for part in _cut_long_words(piece))
    with ctrl_c_ends_process():
        tokenizer.train_from_iterator(parts, trainer)
    return _reset_encoding_options(tokenizer)


def check_writable(path: Path) -> None:
    """Check that `save_tokenizer` can write `path`, before a long training.

    Raises:
        ValueError: `path` is a folder or not a file, holds something else than a tokenizer, or its
            folder is not writable.
    """
    if path.is_dir():
        raise ValueError(f"output {path} is a folder: name a file in it, {path / 'tokenizer.json'}")
    if path.exists() and not path.is_file():
        raise ValueError(f"output {path} is not a file: choose another --output")
    if path.name == "..":
        raise ValueError(f"output {path} ends in no name: choose another --output")
    if path.is_file() and path.stat().st_size:
        try:
            load_tokenizer(path)
        except ValueError:
            raise ValueError(
                f"output {path} exists and is not a tokenizer: choose another --output"
            ) from None
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
        raise ValueError(
            f"output {path} cannot be written because {nearest} is not a writable folder: "
            "choose another --output"
        )


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write `tokenizer` atomically as a Hugging Face `tokenizer.json`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, tokenizer.to_str(pretty=True))


def load_tokenizer(path: Path) -> Tokenizer:
    """Read any Hugging Face `tokenizer.json`.

    Raises:
        ValueError: the file is missing or too large, is not JSON, is not a tokenizer, or has an id
            above `MAX_TOKEN_ID`.
        OSError: the file cannot be read.
    """
    shown = printable(path)
    if not path.is_file():
        raise ValueError(_no_file(path))
    with naming(path), open(path, "rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(
            f"tokenizer {shown} is larger than {MAX_FILE_BYTES:,} bytes: name a tokenizer.json"
        )
    try:
        text = content.decode("utf-8-sig")
        json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"tokenizer {shown} is not JSON ({one_line(error, 200)}): name a Hugging Face "
            "tokenizer.json, not the vocabulary of another library"
        ) from None
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # The library raises nothing narrower.
        raise ValueError(
            f"{shown} is not a tokenizer ({one_line(error, 200)}): name a Hugging Face "
            "tokenizer.json"
        ) from None
    if not tokenizer.get_vocab_size():
        raise ValueError(f"tokenizer {shown} has no tokens: name another tokenizer.json")
    if (largest := vocabulary_size(tokenizer) - 1) > MAX_TOKEN_ID:
        raise ValueError(
            f"tokenizer {shown} has a token with the id {largest:,}, more than {MAX_TOKEN_ID:,}: "
            "name another tokenizer.json"
        )
    return _reset_encoding_options(tokenizer)


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Rows of the embedding: the largest token id plus one, including gaps between ids."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 (hex) of the tokenizer, independent of the file's formatting.

    Truncation and padding are left out because fastllama resets both.
    """
    content = json.loads(tokenizer.to_str())
    del content["truncation"], content["padding"]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def end_token_id(tokenizer: Tokenizer, end_token: str | None = None) -> int:
    """Id of the special token that ends a document: `end_token`, or the first of `END_TOKENS`.

    Raises:
        ValueError: `end_token`, or without it every name in `END_TOKENS`, is not a special token
            of the tokenizer.
    """
    # An ordinary token would end a document wherever the text contains it.
    added = tokenizer.get_added_tokens_decoder()
    special = {token.content: number for number, token in sorted(added.items()) if token.special}
    for name in END_TOKENS if end_token is None else (end_token,):
        if name in special:
            return special[name]
    known = ", ".join(special) or "none"
    if end_token is not None:
        raise ValueError(
            f"end token {end_token!r} is not a special token of the tokenizer: "
            f"set --end-token to one of its special tokens ({known})"
        )
    raise ValueError(
        f"none of the usual end tokens ({', '.join(END_TOKENS)}) is a special token of the "
        f"tokenizer: set --end-token to one of its special tokens ({known})"
    )


def verify_round_trip(tokenizer: Tokenizer, texts: Iterable[str]) -> None:
    """Check that decoding returns every text unchanged.

    Raises:
        ValueError: a text changes; the message quotes its first 80 characters.
    """
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if tokenizer.decode(ids, skip_special_tokens=False) != text:
            raise ValueError(
                f"decoding does not return the text {text[:80]!r}: "
                "train the tokenizer on similar text, or use a byte-level tokenizer"
            )


def _cut_long_words(text: str) -> Iterator[str]:
    """Yield `text` in parts, cut only inside of words longer than `WORD_CHARACTERS`."""
    start = 0
    # A long word covers one of these places and all characters before it, so ordinary text is
    # looked at only there.
    for cut in range(WORD_CHARACTERS, len(text), WORD_CHARACTERS):
        if _is_part_of_a_word(text[cut - WORD_CHARACTERS : cut + 1]):
            yield text[start:cut]
            start = cut
    yield text[start:]


def _is_part_of_a_word(text: str) -> bool:
    """Whether `ByteLevel` makes one word of `text`: of letters, numbers, spaces, or signs."""
    return (
        text.isalpha() or text.isnumeric() or text.isspace() or _SIGNS.fullmatch(text) is not None
    )


def _no_file(path: Path) -> str:
    """Why `path` is no file, and what to name instead."""
    shown = printable(path)
    if path.is_dir():
        return f"tokenizer {shown} is a folder: name its tokenizer.json"
    if path.exists():
        return f"tokenizer {shown} is not a regular file: copy it to one"
    # Of the slashes behind a scheme, `Path` keeps one.
    url = shown.replace(":/", ":///" if shown.startswith("file:") else "://", 1)
    if is_url(url):
        return f"tokenizer {url} is a URL: download it, and name the local file"
    if path.suffix != ".json" and HUB_NAME.fullmatch(shown):
        return (
            f"tokenizer {shown} does not exist. fastllama downloads nothing: for the tokenizer of "
            f"a model, save https://huggingface.co/{shown}/resolve/main/tokenizer.json and name "
            "this file"
        )
    return f"tokenizer {shown} does not exist: train one with `fastllama tokenizer train`"


def _reset_encoding_options(tokenizer: Tokenizer) -> Tokenizer:
    """Encode a special token's name in a text as plain text; never truncate, pad or drop merges.

    Otherwise a document that mentions `<EOS>` would end early, a tokenizer saved for inference
    could truncate long documents, and BPE dropout would encode a text differently each time. A
    `tokenizer.json` does not store the first option and may set the others.
    """
    if isinstance(tokenizer.model, BPE):
        tokenizer.model.dropout = None
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
