"""The manifest of a data folder: its shards of token ids, and checks that they are intact."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastllama.atomic import write_atomic
from fastllama.data.token_file import TokenFile

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"
# Bounds the memory that checking a shard takes.
CHECK_CHUNK_TOKENS = 2**20


@dataclass(frozen=True)
class Shard:
    """One `.npy` file with a 1-D array of token ids."""

    file: str
    tokens: int
    sha256: str  # of the whole file, as sha256sum prints it


@dataclass(frozen=True)
class Split:
    """The token stream "train" or "validation", stored as shards."""

    tokens: int
    documents: int
    text_bytes: int  # UTF-8 bytes of the documents, for bits per byte
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`. `splits` leaves out a split without tokens."""

    dtype: str  # "uint16" or "uint32"
    vocab_size: int
    end_token_id: int
    tokenizer_fingerprint: str
    skipped_records: int
    splits: dict[str, Split]

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read the manifest of `folder`.

        Raises:
            ValueError: the folder or the manifest is missing, or the manifest cannot be read or
                was written by a newer version. An interrupted `prepare` leaves no manifest.
        """
        if not folder.is_dir():
            raise ValueError(f"data folder {folder} does not exist: make it with fastllama prepare")
        path = folder / MANIFEST_FILE
        if not path.is_file():
            raise ValueError(
                f"{folder} has no {MANIFEST_FILE}: if `fastllama prepare` was interrupted, "
                "run the same prepare command again to finish it"
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version = content.pop("format_version")
            if version <= FORMAT_VERSION:
                content["splits"] = {
                    name: split_from_json(split) for name, split in content["splits"].items()
                }
                return cls(**content)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path} cannot be read ({error!r}): delete {folder} and prepare the data again"
            ) from error
        raise ValueError(
            f"{path} has format version {version}, and this fastllama reads versions up to "
            f"{FORMAT_VERSION}: upgrade fastllama or prepare the data again"
        )

    def save(self, folder: Path) -> None:
        """Write `manifest.json` atomically. It marks the folder as complete."""
        content = {"format_version": FORMAT_VERSION, **asdict(self)}
        write_atomic(folder / MANIFEST_FILE, json.dumps(content, indent=2) + "\n")

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the token streams and the tokenizer. Equal data has equal values."""
        streams = {
            name: [(shard.tokens, shard.sha256) for shard in split.shards]
            for name, split in self.splits.items()
        }
        content = [self.dtype, self.tokenizer_fingerprint, streams]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def check_files(self, folder: Path) -> None:
        """Check the size and type of every shard in `folder`. Reads only headers.

        Raises:
            ValueError: a shard is missing or has the wrong size, shape or type.
        """
        for shard in self._shards():
            self._open(folder, shard)

    def check_contents(self, folder: Path) -> None:
        """Check the SHA-256 and the token ids of every shard in `folder`. Reads everything.

        Raises:
            ValueError: as `check_files`, or the checksum differs, or a token id is outside of the
                vocabulary.
        """
        for shard in self._shards():
            path = folder / shard.file
            tokens = self._open(folder, shard)
            found = sha256_of(path)
            if found != shard.sha256:
                raise _damaged(path, f"SHA-256 {found}", shard.sha256)
            starts = range(0, shard.tokens, CHECK_CHUNK_TOKENS)
            largest = max(
                int(tokens.read(start, min(CHECK_CHUNK_TOKENS, shard.tokens - start)).max())
                for start in starts
            )
            if largest >= self.vocab_size:
                raise _damaged(path, f"token id {largest}", f"ids below {self.vocab_size}")

    def _shards(self) -> Iterator[Shard]:
        for split in self.splits.values():
            yield from split.shards

    def _open(self, folder: Path, shard: Shard) -> TokenFile:
        path = folder / shard.file
        dtype = np.dtype(self.dtype)
        expected = f"{shard.tokens} {dtype} tokens"
        try:
            tokens = TokenFile(path)
        except FileNotFoundError:
            raise _damaged(path, "no such file", expected) from None
        except ValueError as error:
            raise _damaged(path, f"no valid .npy file ({error})", expected) from error
        if tokens.dtype != dtype or tokens.shape != (shard.tokens,):
            raise _damaged(path, f"{tokens.dtype} of shape {tokens.shape}", expected)
        size, whole = path.stat().st_size, tokens.offset + shard.tokens * dtype.itemsize
        if size != whole:
            raise _damaged(path, f"{size} bytes", f"{whole}")
        return tokens


def split_from_json(content: dict[str, Any]) -> Split:
    """Rebuild a `Split` from the JSON of its `dataclasses.asdict`."""
    shards = tuple(Shard(**shard) for shard in content["shards"])
    return Split(**{**content, "shards": shards})


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damaged(path: Path, found: str, expected: str) -> ValueError:
    return ValueError(
        f"{path} is damaged: found {found}, expected {expected}; "
        f"restore the file, or delete {path.parent} and prepare the data again"
    )
