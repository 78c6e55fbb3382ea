"""Makes data folders for tests from given tokens."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastllama.data.manifest import Manifest, Shard, Split, sha256_of
from fastllama.data.stream import TokenStream
from fastllama.data.tokenizer import fingerprint, save_tokenizer, train_tokenizer

# 4 special tokens and 256 bytes.
VOCAB_SIZE = 260


def make_folder(
    folder: Path, splits: dict[str, Sequence[Sequence[int]]], dtype: str = "uint16"
) -> Manifest:
    """Write `splits`, each a list of shards of token ids, as `fastllama prepare` would."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer([], VOCAB_SIZE)
    save_tokenizer(tokenizer, folder / "tokenizer.json")
    largest = max(max(shard, default=0) for shards in splits.values() for shard in shards)
    manifest = Manifest(
        dtype=dtype,
        vocab_size=max(VOCAB_SIZE, largest + 1),
        end_token_id=1,
        tokenizer_fingerprint=fingerprint(tokenizer),
        skipped_records=0,
        splits={name: _write_split(folder, name, shards, dtype) for name, shards in splits.items()},
    )
    manifest.save(folder)
    return manifest


def make_stream(folder: Path, *shards: Sequence[int], dtype: str = "uint16") -> TokenStream:
    """A stream over `shards` of token ids, written to `folder` as its training split."""
    return TokenStream(folder, make_folder(folder, {"train": shards}, dtype), "train")


def _write_split(folder: Path, name: str, shards: Sequence[Sequence[int]], dtype: str) -> Split:
    written = []
    for number, tokens in enumerate(shards):
        path = folder / f"{name}-{number:05}.npy"
        np.save(path, np.array(tokens, dtype))
        written.append(Shard(path.name, len(tokens), sha256_of(path)))
    total = sum(map(len, shards))
    # Four bytes of text per token, so bits per byte differ from bits per token.
    return Split(total, documents=1, text_bytes=4 * total, shards=tuple(written))
