"""The manifest of a data folder: its shards of token ids, and checks that they are intact."""

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import ConfigDict, Field
from tokenizers import Tokenizer

from fastllama.atomic import naming
from fastllama.data.checksummed_json import FORMAT_VERSION, read_checksummed, write_checksummed
from fastllama.data.parts import PART_FOLDER, parts_in
from fastllama.data.remote_folder import RemoteFolder, RemoteTokenFile
from fastllama.data.text_loss import TextLoss
from fastllama.data.token_file import HEADER_BYTES, TokenFile
from fastllama.data.tokenizer import fingerprint, load_tokenizer, vocabulary_size
from fastllama.typed_json import DamagedFileError

MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"
JOINED_VERSION = 3
"""The version of a manifest that names shards in folders of parts."""
SHARD_NAME = r"(train|validation)-[0-9]{5,}\.npy"
"""Pattern of the names of the shards that `fastllama prepare` writes."""
# Bounds the memory that checking a shard takes.
CHECK_CHUNK_TOKENS = 2**20

Count = Annotated[int, Field(ge=0)]
FileName = Annotated[
    str, Field(pattern=rf"^([^/\x00]+|{PART_FOLDER}/{SHARD_NAME})$", max_length=255)
]
"""A name inside the folder, or a shard in the folder of a part; never another path."""
DataFolder = Path | RemoteFolder


@dataclass(frozen=True)
class Shard:
    """One `.npy` file with a 1-D array of token ids."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    file: FileName
    tokens: Count
    sha256: str  # of the whole file, as sha256sum prints it


@dataclass(frozen=True)
class Split:
    """The token stream "train" or "validation", stored as shards."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    tokens: Count
    documents: Count
    text_bytes: Count  # UTF-8 bytes of the documents, for bits per byte
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`. `splits` leaves out a split without tokens."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    format_version: int = field(default=FORMAT_VERSION, kw_only=True)
    dtype: Annotated[str, Field(pattern=r"^uint(16|32)$")]
    vocab_size: Count
    end_token_id: Count
    tokenizer_fingerprint: str
    skipped_records: Count
    splits: dict[str, Split]
    text_loss: TextLoss | None = None  # None if the tokenizer represents all of the text

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read the manifest of `folder`.

        Raises:
            ValueError: the folder or the manifest is missing or damaged, or a newer fastllama
                wrote it. An interrupted `prepare` leaves no manifest.
        """
        if folder.is_file():
            raise ValueError(f"{folder} is a file: name the folder that fastllama prepare wrote")
        if not folder.is_dir():
            remedy = ":"
            if not folder.is_absolute():
                remedy = f" in {Path.cwd()}: give its whole path, to a run with --data.path, or"
            raise ValueError(
                f"data folder {folder} does not exist{remedy} make it with fastllama prepare"
            )
        path = folder / MANIFEST_FILE
        if not path.is_file():
            if parts_in(folder):
                raise ValueError(
                    f"{folder} holds parts that are not joined: when all of them are complete, run "
                    f"`fastllama data join {folder}`"
                )
            if (folder / "config.toml").is_file():
                raise ValueError(
                    f"{folder} is a run folder, not a data folder: name the folder that fastllama "
                    "prepare wrote"
                )
            if not any((folder / name).exists() for name in ("job.json", "progress.json")):
                raise ValueError(
                    f"{folder} is no data folder (it has neither {MANIFEST_FILE} nor job.json): "
                    f"encode its text with `fastllama prepare --input {folder} …`"
                )
            raise ValueError(
                f"{folder} has no {MANIFEST_FILE}: if `fastllama prepare` or `fastllama data "
                "import` was interrupted, run the same command again to finish it"
            )
        try:
            manifest = read_checksummed(path, cls, JOINED_VERSION)
            if contradiction := manifest._contradiction():
                raise DamagedFileError(f"{path}: {contradiction}")
        except DamagedFileError as error:
            raise DamagedFileError(
                f"{error}; restore the file, or delete {folder} and prepare the data again"
            ) from None
        return manifest

    def save(self, folder: Path) -> None:
        """Write `manifest.json` atomically. It marks the folder as complete."""
        content = asdict(self) | {"format_version": max(self.format_version, FORMAT_VERSION)}
        if self.text_loss is None:
            del content["text_loss"]
        write_checksummed(folder / MANIFEST_FILE, content)

    @property
    def is_checksummed(self) -> bool:
        """Whether a checksum confirmed the manifest when it was read."""
        return self.format_version > 1

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the token streams and the tokenizer. Equal data has equal values."""
        streams = {
            name: [(shard.tokens, shard.sha256) for shard in split.shards]
            for name, split in self.splits.items()
        }
        content = [self.dtype, self.tokenizer_fingerprint, streams]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def check_files(self, folder: DataFolder) -> None:
        """Check the size and type of every shard in `folder`. Reads only headers.

        Raises:
            ValueError: a shard is missing or has the wrong size, shape or type.
        """
        for shard in self._shards():
            self.open_shard(folder, shard)

    def check_contents(self, folder: DataFolder) -> None:
        """Check every file of `folder` against the manifest. Reads everything.

        Raises:
            ValueError: as `check_files` and `open_tokenizer`, or a checksum differs, a token id is
                outside of the vocabulary, the number of end tokens is not the number of documents,
                or the folder holds a shard that is not listed.
        """
        size = vocabulary_size(self.open_tokenizer(folder))
        if size != self.vocab_size:
            path = folder / TOKENIZER_FILE
            raise damaged(path, f"{size} entries", f"{self.vocab_size}")
        self._check_unlisted(folder)
        for name, split in self.splits.items():
            ends = sum(self._check_shard(folder, shard) for shard in split.shards)
            if ends != split.documents:
                raise DamagedFileError(
                    f"{folder / MANIFEST_FILE} has {split.documents} documents in the split "
                    f"{name}, but its shards have {ends} end tokens: prepare the data again"
                )

    def open_tokenizer(self, folder: DataFolder) -> Tokenizer:
        """The tokenizer that `folder` was prepared with.

        Raises:
            ValueError: `tokenizer.json` is missing, damaged or another tokenizer.
        """
        path = folder / TOKENIZER_FILE
        try:
            tokenizer = load_tokenizer(path)
        except ValueError as error:
            raise DamagedFileError(
                f"{path} is missing or damaged: restore it, or copy the tokenizer.json that the "
                "data was prepared with"
            ) from error
        if fingerprint(tokenizer) != self.tokenizer_fingerprint:
            raise ValueError(
                f"{folder} was not prepared with the tokenizer {path}; restore the file, or "
                "prepare the data again with this tokenizer"
            )
        return tokenizer

    def _contradiction(self) -> str | None:
        """What no `prepare` writes, such as counts that do not add up; None if all is well."""
        names = [shard.file for shard in self._shards()]
        if len(set(names)) < len(names):
            return "a shard is listed twice"
        if self.end_token_id >= self.vocab_size:
            return f"end_token_id {self.end_token_id} is not below vocab_size {self.vocab_size}"
        for name, split in self.splits.items():
            tokens = sum(shard.tokens for shard in split.shards)
            if tokens != split.tokens:
                return f"the split {name} has {split.tokens} tokens, and its shards {tokens}"
        return None

    def _shards(self) -> Iterator[Shard]:
        for split in self.splits.values():
            yield from split.shards

    def _check_unlisted(self, folder: DataFolder) -> None:
        listed = {shard.file for shard in self._shards()}
        for name in _names_in(folder):
            if re.fullmatch(SHARD_NAME, os.path.basename(name)) and name not in listed:
                raise DamagedFileError(
                    f"{folder}/{name} is not listed in {MANIFEST_FILE}: move the shard away, or "
                    f"delete {folder} and prepare the data again"
                )

    def _check_shard(self, folder: DataFolder, shard: Shard) -> int:
        """Check one shard, and return its number of end tokens."""
        tokens = self.open_shard(folder, shard)
        digest = hashlib.sha256(tokens.header)
        largest, ends = 0, 0
        for start in range(0, shard.tokens, CHECK_CHUNK_TOKENS):
            chunk = tokens.read(start, min(CHECK_CHUNK_TOKENS, shard.tokens - start))
            digest.update(chunk.data)
            largest = max(largest, int(chunk.max()))
            ends += int(np.count_nonzero(chunk == self.end_token_id))
        path = tokens.path
        if digest.hexdigest() != shard.sha256:
            raise damaged(path, f"SHA-256 {digest.hexdigest()}", shard.sha256)
        if largest >= self.vocab_size:
            raise damaged(path, f"token id {largest}", f"ids below {self.vocab_size}")
        return ends

    def open_shard(self, folder: DataFolder, shard: Shard) -> TokenFile | RemoteTokenFile:
        """Open a shard, and check its size and type. Of a URL, only its size.

        Raises:
            ValueError: the shard is missing or has the wrong size, shape or type.
            OSError: the disk fails.
        """
        dtype = np.dtype(self.dtype)
        expected = f"{shard.tokens} {dtype} tokens"
        if isinstance(folder, RemoteFolder):
            url, remote = f"{folder}/{shard.file}", folder.files.get(shard.file)
            if remote is None:
                raise damaged(url, "no such file", expected)
            if remote.size != (whole := HEADER_BYTES + shard.tokens * dtype.itemsize):
                raise damaged(url, f"{remote.size} bytes", f"{whole}")
            return RemoteTokenFile(remote, dtype, shard.tokens, folder.cache)
        path = folder / shard.file
        try:
            tokens = TokenFile(path)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise
            raise damaged(path, "no such file", expected) from None
        except ValueError as error:
            raise damaged(path, f"no valid .npy file ({error})", expected) from error
        if tokens.dtype != dtype or tokens.shape != (shard.tokens,):
            raise damaged(path, f"{tokens.dtype} of shape {tokens.shape}", expected)
        size, whole = path.stat().st_size, len(tokens.header) + shard.tokens * dtype.itemsize
        if size != whole:
            raise damaged(path, f"{size} bytes", f"{whole}")
        return tokens


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with naming(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _names_in(folder: DataFolder) -> list[str]:
    """Files of a data folder and of the parts in it, sorted."""
    if isinstance(folder, RemoteFolder):
        return sorted(folder.files)
    below = ["", *(part.folder for part in parts_in(folder))]
    return [
        str(path.relative_to(folder))
        for each in below
        for path in sorted((folder / each).iterdir())
    ]


def damaged(path: Path | str, found: str, expected: str) -> DamagedFileError:
    """The error for a file of a data folder that is not as `prepare` wrote it."""
    return DamagedFileError(
        f"{path} is damaged: found {found}, expected {expected}; "
        f"restore the file, or delete {os.path.dirname(path)} and prepare the data again"
    )
