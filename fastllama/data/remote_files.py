"""Files behind URLs: read by ranges, and recognised again by size and version."""

import io
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from fsspec import AbstractFileSystem

from fastllama.urls import patiently, shown

BLOCK_BYTES = 2**23
"""Bytes of a request. Smaller ones wait longer for answers than for data."""
REQUESTS = 32
"""Requests at a time about the state of files. Each waits for an answer, and computes nothing."""
_VERSIONS = (
    *("ETag", "etag", "md5Hash", "blob_id"),
    *("mtime", "LastModified", "Last-Modified", "last_modified", "updated", "created"),
)
"""Where file systems tell the version of a file: by its content, or else by a time."""


@dataclass(frozen=True)
class RemoteFile:
    """A file behind a URL, as it was when it was found."""

    url: str
    size: int  # bytes
    version: str  # ETag, hash or time of modification; empty where the server gives none

    @classmethod
    def find(cls, url: str, info: dict[str, Any] | None = None) -> "RemoteFile":
        """Look at `url`. `info` is what a listing told about it.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it may not be read, or the server does not tell its size.
            OSError: the network fails.
        """
        if info is None or info.get("size") is None or not _version(info):
            info = patiently(url, _fresh_info)
        if info.get("size") is None:
            raise ValueError(
                f"cannot read {shown(url)}: the server does not tell its size; download it"
            )
        return cls(url, int(info["size"]), _version(info))

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part of the URL, without a query."""
        return os.path.basename(path_of(self.url))

    def open(self) -> io.BufferedReader:
        """Open the file for reading. Every read raises as `read` does."""
        return io.BufferedReader(_Raw(self), BLOCK_BYTES)

    def read(self, first: int, n: int) -> bytes:
        """Bytes [first, first + n), which are inside of the file.

        Raises:
            ValueError: the file is gone or was changed, it may not be read, or the server sends
                only whole files.
            OSError: the network fails.
        """

        def request(files: AbstractFileSystem, path: str) -> bytes:
            # Others would read ahead, into a buffer that ends with this request.
            options = {} if files.async_impl else {"cache_type": "none"}
            data = files.cat_file(path, start=first, end=first + n, **options)
            if len(data) > n:
                raise ValueError("the server sends only whole files; download it")
            if len(data) < n:
                raise EOFError(f"{len(data):,} of {n:,} bytes came")
            return data

        try:
            return patiently(self.url, request)
        except OSError:
            # A file that became shorter has no such bytes either.
            self.check_unchanged()
            raise

    def check_unchanged(self) -> None:
        """Raise ValueError if the file is gone, or has another size or version by now."""
        try:
            is_same = RemoteFile.find(self.url) == self
        except FileNotFoundError:
            raise ValueError(
                f"{shown(self.url)} cannot be read any more (it does not exist): put it back, and "
                "run the same command again"
            ) from None
        if not is_same:
            raise ValueError(
                f"{shown(self.url)} was changed while it was read: put the earlier version back, "
                "and run the same command again"
            )


def check_unchanged(files: Iterable[RemoteFile]) -> None:
    """Raise ValueError if one of `files` is gone or was changed."""
    with ThreadPoolExecutor(REQUESTS) as pool:
        for _ in pool.map(RemoteFile.check_unchanged, files):
            pass


def path_of(url: str) -> str:
    """`url` without its query, which only HTTP has."""
    return urlsplit(url).path if url.lower().startswith(("http://", "https://")) else url


def _fresh_info(files: AbstractFileSystem, path: str) -> dict[str, Any]:
    # Hugging Face's file system keeps listings, whatever it is told.
    files.invalidate_cache()
    return files.info(path)


def _version(info: dict[str, Any]) -> str:
    # Some listings leave out the quotation marks of an ETag.
    return next((str(info[key]).strip('"') for key in _VERSIONS if info.get(key)), "")


class _Raw(io.RawIOBase):
    """The bytes of a file, one request for each read."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._file.size}[whence]
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        n = min(len(buffer), self._file.size - self._at)
        if n <= 0:
            return 0
        buffer[:n] = self._file.read(self._at, n)
        self._at += n
        return n
