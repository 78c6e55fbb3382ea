"""A data folder behind a URL: its small files are copied, and its shards read by ranges."""

import hashlib
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from fsspec import AbstractFileSystem
from numpy.typing import NDArray

from fastllama.data.block_cache import BlockCache, block_cache, write_shared
from fastllama.data.remote_files import RemoteFile
from fastllama.data.token_file import HEADER_BYTES
from fastllama.urls import patiently

COPIED = ("manifest.json", "tokenizer.json")


@dataclass(frozen=True)
class RemoteFolder:
    """A data folder behind a URL. `folder / name` is the local copy of a small file."""

    url: str
    local: Path
    """The folder of the copies."""
    files: dict[str, RemoteFile]
    """Every file of the folder, by its path in it."""
    cache: BlockCache | None
    """Keeps what is read of the shards; None keeps nothing."""

    @classmethod
    def open(cls, url: str, cache_folder: Path, cache_bytes: int) -> "RemoteFolder":
        """List the folder, and copy its manifest and its tokenizer.

        `cache_folder` gets the copies, and up to `cache_bytes` of the shards; with 0, what is read
        of them is not kept.

        Raises:
            ValueError: it has no manifest, or may not be read.
            OSError: the network or the disk fails.
        """
        url = url.rstrip("/")
        local = cache_folder / hashlib.sha256(url.encode()).hexdigest()[:32]
        files = _list_files(url)
        for name in COPIED:
            if name not in files:
                raise ValueError(
                    f"{url} has no {name}: copy a whole folder there, which `fastllama prepare` "
                    "has finished"
                )
            write_shared(local / name, files[name].read(0, files[name].size))
        cache = block_cache(cache_folder, cache_bytes, os.getpid()) if cache_bytes else None
        return cls(url, local, files, cache)

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> Path:
        return self.local / name


class RemoteTokenFile:
    """A `.npy` file of token ids behind a URL, read as a `TokenFile`. Threads may read it."""

    def __init__(
        self, file: RemoteFile, dtype: np.dtype, n_tokens: int, cache: BlockCache | None
    ) -> None:
        """The header has `HEADER_BYTES`, and is not read."""
        self.path = file.url
        self.dtype, self.shape = dtype, (n_tokens,)
        self.stamp = file.size, file.version
        self._file = file
        self._read = file.read if cache is None else partial(cache.read, file)
        self._cache = cache

    @property
    def header(self) -> bytes:
        return self._read(0, HEADER_BYTES)

    def read(self, first: int, n: int) -> NDArray[np.integer]:
        """Tokens [first, first + n) as a read-only array (n,).

        Raises:
            ValueError: the file is gone or may not be read.
            OSError: the network fails.
        """
        return np.frombuffer(self._read(*self._span(first, n)), self.dtype)

    def fetch(self, first: int, n: int) -> None:
        """Start to fetch the tokens [first, first + n)."""
        if self._cache is not None:
            self._cache.fetch(self._file, *self._span(first, n))

    def _span(self, first: int, n: int) -> tuple[int, int]:
        """First byte and number of bytes of tokens."""
        return HEADER_BYTES + first * self.dtype.itemsize, n * self.dtype.itemsize


def _list_files(url: str) -> dict[str, RemoteFile]:
    """The files below `url`, by their paths from there."""

    def find(files: AbstractFileSystem, path: str) -> dict[str, RemoteFile]:
        files.invalidate_cache()
        top = f"{path.strip('/')}/"
        found = files.find(path, detail=True)
        names = {name: name.strip("/").removeprefix(top) for name in found}
        return {
            names[name]: RemoteFile.find(f"{url}/{names[name]}", info)
            for name, info in found.items()
        }

    try:
        return patiently(url, find)
    except FileNotFoundError as error:
        raise ValueError(
            f"data folder {url} does not exist ({error.strerror}): copy it there, or name another"
        ) from None
