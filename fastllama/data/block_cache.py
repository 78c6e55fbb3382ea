"""Blocks of files behind URLs, fetched ahead of use and kept in a local folder of bounded size.

Training reads sequences in a random order over all shards. A cache of whole shards would therefore
need room for all of them. Several processes may share the folder: a block is complete when it has
its name.
"""

import hashlib
import os
import queue
import re
import secrets
import threading
import zlib
from concurrent.futures import Future
from contextlib import suppress
from functools import cache
from pathlib import Path

from fastllama.atomic import report_once
from fastllama.data.remote_files import REQUESTS, RemoteFile

BLOCK_BYTES = 2**18
"""Bytes of a block. Each sequence needs one or two; smaller ones would hardly come sooner."""
CHECKSUM_BYTES = 4
_BLOCK = re.compile(r"[0-9a-f]{32}/\.?[0-9]{8}(\.[0-9a-f]{8})?")
"""Names of blocks, also of those that were never completed. Only these are deleted."""


class BlockCache:
    """The blocks of files of one process. Threads may call it at the same time."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Keep at most `max_bytes` in `folder`, which is created.

        Raises:
            OSError: the folder cannot be created.
        """
        self._folder, self._max_bytes = folder, max_bytes
        self._lock = threading.Lock()
        self._pending: dict[Path, Future[bytes]] = {}
        self._wanted: queue.SimpleQueue[tuple[RemoteFile, int, Future[bytes]]] = queue.SimpleQueue()
        # At the first block, sweep: an earlier run may have had a larger bound.
        self._written = max_bytes
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(REQUESTS):
            # The threads of an executor would hold up the exit of a failed run.
            threading.Thread(target=self._work, name=f"fetch-{number}", daemon=True).start()

    def read(self, file: RemoteFile, first: int, n: int) -> bytes:
        """Bytes [first, first + n) of `file`, from the cache or its URL.

        Raises:
            ValueError: the file is gone or may not be read.
            OSError: the network fails.
        """
        blocks = _blocks(first, n)
        data = b"".join(self._block(file, block) for block in blocks)
        start = first - blocks.start * BLOCK_BYTES
        return data[start : start + n]

    def fetch(self, file: RemoteFile, first: int, n: int) -> None:
        """Start to fetch what `read` with these arguments will need. Its errors are told there."""
        for block in _blocks(first, n):
            path = self._path(file, block)
            with self._lock:
                if path in self._pending or path.exists():
                    continue
                self._pending[path] = future = Future[bytes]()
            self._wanted.put((file, block, future))

    def _work(self) -> None:
        while True:
            file, block, future = self._wanted.get()
            try:
                future.set_result(self._download(file, block))
            except Exception as error:  # `read` raises it.
                future.set_exception(error)
            with self._lock:
                del self._pending[self._path(file, block)]

    def _block(self, file: RemoteFile, block: int) -> bytes:
        path = self._path(file, block)
        with self._lock:
            pending = self._pending.get(path)
        if pending is not None:
            return pending.result()
        return _stored(path) or self._download(file, block)

    def _download(self, file: RemoteFile, block: int) -> bytes:
        start = block * BLOCK_BYTES
        data = file.read(start, min(BLOCK_BYTES, file.size - start))
        try:
            self._store(self._path(file, block), data)
        except OSError as error:
            # Without a cache, training goes on, more slowly.
            report_once(
                str(self._folder),
                f"{self._folder} cannot keep blocks of the data ({error.strerror}); they are "
                "fetched for each use.",
            )
        return data

    def _store(self, path: Path, data: bytes) -> None:
        with self._lock:
            # All processes of a machine together stay below the bound: each looks soon enough.
            is_time = self._written >= self._max_bytes // 64
            self._written = 0 if is_time else self._written + len(data) + CHECKSUM_BYTES
        if is_time:
            self._sweep()
        write_shared(path, data + _checksum(data))

    def _sweep(self) -> None:
        """Delete the oldest blocks until an eighth of the bound is free."""
        found = []
        # Another process may sweep too, so what was there may be gone.
        with os.scandir(self._folder) as folders:
            for folder in folders:
                with suppress(OSError), os.scandir(folder) as entries:
                    for entry in entries:
                        if _BLOCK.fullmatch(f"{folder.name}/{entry.name}"):
                            with suppress(FileNotFoundError):
                                status = entry.stat(follow_symlinks=False)
                                found.append((status.st_mtime_ns, status.st_size, entry.path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self._max_bytes * 7 // 8:
                break
            with suppress(OSError):
                os.unlink(path)
            total -= size

    def _path(self, file: RemoteFile, block: int) -> Path:
        # The version: a file that was replaced has other blocks.
        key = hashlib.sha256(repr((file.url, file.size, file.version)).encode()).hexdigest()[:32]
        return self._folder / key / f"{block:08d}"


@cache
def block_cache(folder: Path, max_bytes: int, process: int) -> BlockCache:
    """The one `BlockCache` of a process for this folder. A fork has none of the threads."""
    return BlockCache(folder, max_bytes)


def write_shared(path: Path, content: bytes) -> None:
    """Write a file that other processes may be writing too, with the same content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        aside.write_bytes(content)
        os.replace(aside, path)
    except OSError:
        with suppress(OSError):
            aside.unlink()
        raise


def _stored(path: Path) -> bytes | None:
    """The block at `path`; None if it is not there, or damaged as by a power cut."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    data, checksum = content[:-CHECKSUM_BYTES], content[-CHECKSUM_BYTES:]
    return data if data and checksum == _checksum(data) else None


def _blocks(first: int, n: int) -> range:
    """Numbers of the blocks with the bytes [first, first + n)."""
    return range(first // BLOCK_BYTES, (first + n - 1) // BLOCK_BYTES + 1)


def _checksum(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(CHECKSUM_BYTES, "little")
