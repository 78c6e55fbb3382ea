"""Writes the tokens of a split into `.npy` shards of equal size. A partial shard is never valid."""

import io
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fastllama.atomic import fsync_folder
from fastllama.data.manifest import Shard, sha256_of

HEADER_BYTES = 128


@dataclass
class SplitProgress:
    """What is written of one split: complete `shards`, then `open_tokens` in the open shard."""

    documents: int = 0
    text_bytes: int = 0
    shards: list[Shard] = field(default_factory=list)
    open_tokens: int = 0

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards) + self.open_tokens


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
    ) -> None:
        self.folder = folder
        self.name = name
        self.shard_tokens = shard_tokens
        self.dtype = dtype
        self.progress = progress
        if progress.open_tokens:
            self._truncate()

    @property
    def open_path(self) -> Path:
        return self.folder / f"{self.name}-{len(self.progress.shards):05d}.npy"

    def append(self, tokens: np.ndarray) -> None:
        """Append a 1-D array of `dtype`. Complete each shard that becomes full."""
        while tokens.size:
            if not self.progress.open_tokens:
                self.open_path.write_bytes(bytes(HEADER_BYTES))
                fsync_folder(self.folder)
            now = tokens[: self.shard_tokens - self.progress.open_tokens]
            with open(self.open_path, "ab") as file:
                file.write(now.data)
            self.progress.open_tokens += now.size
            if self.progress.open_tokens == self.shard_tokens:
                self.complete_shard()
            tokens = tokens[now.size :]

    def sync(self) -> None:
        """Flush all appended tokens to the disk."""
        if self.progress.open_tokens:
            with open(self.open_path, "rb") as file:
                os.fsync(file.fileno())

    def complete_shard(self) -> None:
        """Write the header of the open shard, which must have at least one token."""
        path = self.open_path
        tokens = self.progress.open_tokens
        with open(path, "r+b") as file:
            file.write(_npy_header(self.dtype, tokens))
            file.flush()
            os.fsync(file.fileno())
        self.progress.shards.append(Shard(path.name, tokens, sha256_of(path)))
        self.progress.open_tokens = 0

    def _truncate(self) -> None:
        """Cut the open shard to its recorded tokens."""
        size = HEADER_BYTES + self.progress.open_tokens * self.dtype.itemsize
        if not self.open_path.exists() or self.open_path.stat().st_size < size:
            raise ValueError(
                f"{self.open_path} lacks tokens that were already written: "
                f"delete {self.folder} and prepare the data again"
            )
        os.truncate(self.open_path, size)


def _npy_header(dtype: np.dtype, tokens: int) -> bytes:
    """Header of a 1-D array. NumPy pads it to the same size for any number of tokens."""
    header = io.BytesIO()
    description = {"descr": dtype.str, "fortran_order": False, "shape": (tokens,)}
    np.lib.format.write_array_header_1_0(header, description)
    if header.tell() != HEADER_BYTES:
        raise RuntimeError(f"NumPy wrote a header of {header.tell()} bytes, not {HEADER_BYTES}")
    return header.getvalue()
