"""Writes the tokens of a split into `.npy` shards of equal size. A partial shard is never valid."""

import hashlib
import io
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from pydantic import ConfigDict

from fastllama.atomic import fsync_file, fsync_folder, naming, no_links
from fastllama.data.manifest import Count, Shard, damaged, sha256_of

HEADER_BYTES = 128
CHECK_CHUNK_BYTES = 2**20


@dataclass
class SplitProgress:
    """What is written of one split: complete `shards`, then `open_tokens` in the open shard."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    documents: Count = 0
    text_bytes: Count = 0
    shards: list[Shard] = field(default_factory=list)
    open_tokens: Count = 0
    open_sha256: str = ""  # of the tokens in the open shard
    created: Count = 0  # shard files, counted before each one is created

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards) + self.open_tokens

    @property
    def used(self) -> int:
        """Number of shard files that hold these tokens."""
        return len(self.shards) + bool(self.open_tokens)


class SplitWriter:
    """Appends token ids to the shards of one split.

    The header of a shard stays zero until the shard is complete, so no reader accepts a partial
    shard as an array.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        shard_tokens: int,
        progress: SplitProgress,
        dtype: np.dtype,
        before_create: Callable[[], None] = lambda: None,
    ) -> None:
        """Cut the open shard to its recorded tokens.

        `before_create` is called before each shard file is created.

        Raises:
            ValueError: the open shard does not hold its recorded tokens, or is a link.
        """
        self.folder = folder
        self.name = name
        self.shard_tokens = shard_tokens
        self.dtype = dtype
        self.progress = progress
        self._before_create = before_create
        self._digest = hashlib.sha256()
        if progress.open_tokens:
            self._restore()

    @property
    def open_path(self) -> Path:
        return self.folder / shard_name(self.name, len(self.progress.shards))

    def append(self, tokens: np.ndarray) -> None:
        """Append a 1-D array of `dtype`. Complete each shard that becomes full.

        Raises:
            ValueError: a file is in the way of a shard, or the open shard was replaced by a link.
        """
        while tokens.size:
            if not self.progress.open_tokens:
                self._create()
            now = tokens[: self.shard_tokens - self.progress.open_tokens]
            with naming(self.open_path), _open_own(self.open_path) as file:
                file.seek(self._open_bytes)
                file.write(now.data)
            self._digest.update(now.data)
            self.progress.open_tokens += now.size
            if self.progress.open_tokens == self.shard_tokens:
                self.complete_shard()
            tokens = tokens[now.size :]

    def sync(self) -> None:
        """Flush all appended tokens to the disk, and record their checksum."""
        if self.progress.open_tokens:
            fsync_file(self.open_path)
            self.progress.open_sha256 = self._digest.hexdigest()

    def complete_shard(self) -> None:
        """Write the header of the open shard, which must have at least one token."""
        path = self.open_path
        tokens = self.progress.open_tokens
        with naming(path), _open_own(path) as file:
            file.write(_npy_header(self.dtype, tokens))
        fsync_file(path)
        self.progress.shards.append(Shard(path.name, tokens, sha256_of(path)))
        self.progress.open_tokens = 0
        self.progress.open_sha256 = ""

    @property
    def _open_bytes(self) -> int:
        return HEADER_BYTES + self.progress.open_tokens * self.dtype.itemsize

    def _create(self) -> None:
        path = self.open_path
        if os.path.lexists(path):
            raise ValueError(
                f"{path} is in the way: `fastllama prepare` has no record of writing it; move it "
                "elsewhere, or choose another --output"
            )
        self._before_create()
        self.progress.created += 1
        with naming(path), open(path, "xb") as file:
            file.write(bytes(HEADER_BYTES))
        fsync_folder(self.folder)
        self._digest = hashlib.sha256()

    def _restore(self) -> None:
        path = self.open_path
        if not path.exists() or path.stat().st_size < self._open_bytes:
            raise ValueError(
                f"{path} lacks tokens that were already written: "
                f"delete {self.folder} and prepare the data again"
            )
        with naming(path), _open_own(path) as file:
            for start in range(HEADER_BYTES, self._open_bytes, CHECK_CHUNK_BYTES):
                file.seek(start)
                self._digest.update(file.read(min(CHECK_CHUNK_BYTES, self._open_bytes - start)))
            if self._digest.hexdigest() != self.progress.open_sha256:
                expected = self.progress.open_sha256
                raise damaged(path, f"tokens of SHA-256 {self._digest.hexdigest()}", expected)
            file.truncate(self._open_bytes)


def shard_name(split: str, number: int) -> str:
    """File name of shard `number` of `split`, from 0."""
    return f"{split}-{number:05d}.npy"


def _open_own(path: Path) -> BinaryIO:
    """Open a shard that `SplitWriter` created, to change it.

    Raises:
        ValueError: the shard was replaced by a link or by another kind of file.
    """
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        raise ValueError(
            f"{path} was replaced by a link or a special file: delete {path.parent} and prepare "
            "the data again"
        )
    return open(path, "r+b", opener=no_links)


def _npy_header(dtype: np.dtype, tokens: int) -> bytes:
    """Header of a 1-D array. NumPy pads it to the same size for any number of tokens."""
    header = io.BytesIO()
    description = {"descr": dtype.str, "fortran_order": False, "shape": (tokens,)}
    np.lib.format.write_array_header_1_0(header, description)
    if header.tell() != HEADER_BYTES:
        raise RuntimeError(f"NumPy wrote a header of {header.tell()} bytes, not {HEADER_BYTES}")
    return header.getvalue()
