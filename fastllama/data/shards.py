"""Writes the tokens of a split into `.npy` shards of equal size. A partial shard is never valid."""

import hashlib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import ConfigDict

from fastllama.atomic import fsync_file, fsync_folder, naming
from fastllama.data.manifest import Count, Shard, damaged, sha256_of
from fastllama.data.shard_list import ShardList, open_own, shard_name
from fastllama.data.token_file import HEADER_BYTES

CHECK_CHUNK_BYTES = 2**20


@dataclass
class SplitProgress:
    """What is written of one split: `complete` shards, then `open_tokens` in the open shard."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    documents: Count = 0
    text_bytes: Count = 0
    tokens: Count = 0  # of all shards
    complete: Count = 0
    list_sha256: str = ""  # of the lines for these shards in `ShardList`
    open_tokens: Count = 0
    open_sha256: str = ""  # of the tokens in the open shard
    created: Count = 0  # shard files, counted before each one is created

    @property
    def used(self) -> int:
        """Number of shard files that hold these tokens."""
        return self.complete + bool(self.open_tokens)


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
            ValueError: the list of complete shards is damaged, or the open shard does not hold its
                recorded tokens, or is a link.
        """
        self.folder = folder
        self.name = name
        self.shard_tokens = shard_tokens
        self.dtype = dtype
        self.progress = progress
        self._before_create = before_create
        self._list = ShardList(folder, name, progress.complete, progress.list_sha256, shard_tokens)
        self._digest = hashlib.sha256()
        if progress.open_tokens:
            self._restore()

    @property
    def shards(self) -> list[Shard]:
        """The complete shards."""
        return self._list.shards

    @property
    def open_path(self) -> Path:
        return self.folder / shard_name(self.name, self.progress.complete)

    def append(self, tokens: np.ndarray) -> None:
        """Append a 1-D array of `dtype`. Complete each shard that becomes full.

        Raises:
            ValueError: a file is in the way of a shard, or the open shard was replaced by a link.
        """
        while tokens.size:
            if not self.progress.open_tokens:
                self._create()
            now = tokens[: self.shard_tokens - self.progress.open_tokens]
            with naming(self.open_path), open_own(self.open_path) as file:
                file.seek(self._open_bytes)
                file.write(now.data)
            self._digest.update(now.data)
            self.progress.open_tokens += now.size
            self.progress.tokens += now.size
            if self.progress.open_tokens == self.shard_tokens:
                self.complete_shard()
            tokens = tokens[now.size :]

    def sync(self) -> None:
        """Flush the tokens and the list of shards to the disk, and record their checksums."""
        if self.progress.open_tokens:
            fsync_file(self.open_path)
            self.progress.open_sha256 = self._digest.hexdigest()
        self.progress.list_sha256 = self._list.write()

    def complete_shard(self) -> None:
        """Write the header of the open shard, which must have at least one token."""
        path = self.open_path
        tokens = self.progress.open_tokens
        with naming(path), open_own(path) as file:
            file.write(_npy_header(self.dtype, tokens))
        fsync_file(path)
        self.shards.append(Shard(path.name, tokens, sha256_of(path)))
        self.progress.complete += 1
        self.progress.open_tokens = 0
        self.progress.open_sha256 = ""

    @property
    def _open_bytes(self) -> int:
        return HEADER_BYTES + self.progress.open_tokens * self.dtype.itemsize

    def _create(self) -> None:
        path = self.open_path
        # The list is written after the first shard, and is recorded together with it.
        for new in (path,) if self.progress.created else (path, self._list.path):
            if os.path.lexists(new):
                raise ValueError(
                    f"{new} is in the way: `fastllama prepare` has no record of writing it; move "
                    "it elsewhere, or choose another --output"
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
        with naming(path), open_own(path) as file:
            for start in range(HEADER_BYTES, self._open_bytes, CHECK_CHUNK_BYTES):
                file.seek(start)
                self._digest.update(file.read(min(CHECK_CHUNK_BYTES, self._open_bytes - start)))
            if self._digest.hexdigest() != self.progress.open_sha256:
                expected = self.progress.open_sha256
                raise damaged(path, f"tokens of SHA-256 {self._digest.hexdigest()}", expected)
            file.truncate(self._open_bytes)


def _npy_header(dtype: np.dtype, tokens: int) -> bytes:
    """Header of a 1-D array. NumPy pads it to the same size for any number of tokens."""
    header = io.BytesIO()
    description = {"descr": dtype.str, "fortran_order": False, "shape": (tokens,)}
    np.lib.format.write_array_header_1_0(header, description)
    if header.tell() != HEADER_BYTES:
        raise RuntimeError(f"NumPy wrote a header of {header.tell()} bytes, not {HEADER_BYTES}")
    return header.getvalue()
