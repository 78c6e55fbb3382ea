"""What a data folder holds: the shards of token ids, and how to know that they are whole."""

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
# At a time, so that a check of any shard takes little memory.
CHECKED_TOKENS = 2**20


@dataclass(frozen=True)
class Shard:
    """One `.npy` file with a 1-D array of token ids."""

    file: str
    tokens: int
    sha256: str  # of the whole file, as sha256sum prints it


@dataclass(frozen=True)
class Split:
    """The documents of one use, "train" or "validation", as one stream over its shards."""

    tokens: int
    documents: int
    text_bytes: int  # of the documents in UTF-8, for bits per byte
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`; only splits with at least one token are in `splits`."""

    dtype: str  # "uint16" or "uint32"
    vocab_size: int
    end_token_id: int
    tokenizer_fingerprint: str
    skipped_records: int
    splits: dict[str, Split]

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read the manifest of `folder`.

        Raises ValueError when there is no such folder, no manifest (an interrupted preparation),
        or one that cannot be read or that a newer version wrote.
        """
        if not folder.is_dir():
            raise ValueError(f"data folder {folder} does not exist: make it with fastllama prepare")
        path = folder / MANIFEST_FILE
        if not path.is_file():
            raise ValueError(
                f"{folder} has no {MANIFEST_FILE}: if its preparation was interrupted, "
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
            f"{path} has format version {version} and this fastllama reads up to "
            f"{FORMAT_VERSION}: upgrade fastllama or prepare the data again"
        )

    def save(self, folder: Path) -> None:
        """Write `manifest.json`, whole or not at all; with it the folder counts as complete."""
        content = {"format_version": FORMAT_VERSION, **asdict(self)}
        write_atomic(folder / MANIFEST_FILE, json.dumps(content, indent=2) + "\n")

    def fingerprint(self) -> str:
        """SHA-256 (hex) of what determines the token streams and the meaning of their ids."""
        streams = {
            name: [(shard.tokens, shard.sha256) for shard in split.shards]
            for name, split in self.splits.items()
        }
        content = [self.dtype, self.tokenizer_fingerprint, streams]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def check_files(self, folder: Path) -> None:
        """Raise ValueError for a shard in `folder` that is missing or of the wrong size or type.

        Reads only headers.
        """
        for shard in self._shards():
            self._open(folder, shard)

    def check_contents(self, folder: Path) -> None:
        """Raise ValueError for a shard in `folder` whose bytes or token ids are wrong.

        Reads everything.
        """
        for shard in self._shards():
            path = folder / shard.file
            tokens = self._open(folder, shard)
            found = sha256_of(path)
            if found != shard.sha256:
                raise _damage(path, f"SHA-256 {found}", shard.sha256)
            starts = range(0, shard.tokens, CHECKED_TOKENS)
            largest = max(
                int(tokens.read(start, min(CHECKED_TOKENS, shard.tokens - start)).max())
                for start in starts
            )
            if largest >= self.vocab_size:
                raise _damage(path, f"token id {largest}", f"ids below {self.vocab_size}")

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
            raise _damage(path, "no such file", expected) from None
        except ValueError as error:
            raise _damage(path, f"no whole .npy file ({error})", expected) from error
        if tokens.dtype != dtype or tokens.shape != (shard.tokens,):
            raise _damage(path, f"{tokens.dtype} of shape {tokens.shape}", expected)
        size, whole = path.stat().st_size, tokens.offset + shard.tokens * dtype.itemsize
        if size != whole:
            raise _damage(path, f"{size} bytes", f"{whole}")
        return tokens


def split_from_json(content: dict[str, Any]) -> Split:
    """The inverse of `dataclasses.asdict` for a split that has been through JSON."""
    shards = tuple(Shard(**shard) for shard in content["shards"])
    return Split(**{**content, "shards": shards})


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a whole file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damage(path: Path, found: str, expected: str) -> ValueError:
    return ValueError(
        f"{path} is damaged: found {found}, expected {expected}; "
        f"restore the file, or delete {path.parent} and prepare the data again"
    )
