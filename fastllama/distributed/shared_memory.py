"""Memory that the processes of a group share, if all of them run on one machine."""

import mmap
import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

FOLDER = Path("/dev/shm")
"""A file system in memory, on Linux."""
SIZE = 32 * 2**20
"""Bytes for a group. Of a container's /dev/shm, which often has 64 MiB, half is left."""


class SharedMemory:
    """Lets each rank of a group hand parts of its tensors to all others, a part in each round."""

    def __init__(self, group: dist.ProcessGroup, memory: mmap.mmap) -> None:
        self._group, self._round = group, 0
        # Rounds alternate between two halves. Who writes a half again has passed the barrier of the
        # round between, so every rank has read what was there.
        n_bytes = SIZE // (2 * group.size()) // 16 * 16
        halves = torch.frombuffer(memory, dtype=torch.uint8, count=2 * group.size() * n_bytes)
        self._halves = halves.view(2, group.size(), n_bytes)

    @classmethod
    def open(cls, group: dist.ProcessGroup) -> "SharedMemory | None":
        """Share memory with the other ranks of `group`, all of which call this.

        Returns:
            None on every rank if one of them cannot: it runs on another machine, or /dev/shm is
            missing or full.
        """
        path = _create() if group.rank() == 0 else None
        try:
            paths = [path]
            dist.broadcast_object_list(paths, group=group, group_src=0)
            memory = None if paths[0] is None else _map(paths[0])
            opened = torch.tensor(int(memory is not None))
            dist.all_reduce(opened, dist.ReduceOp.MIN, group=group)
        finally:
            if path is not None:
                # The memory stays until the last rank ends, however it ends.
                path.unlink()
        return None if memory is None or not opened.item() else cls(group, memory)

    def round_length(self, dtype: torch.dtype) -> int:
        """Elements of `dtype` that a rank can hand over in a round."""
        return self._halves.shape[2] // dtype.itemsize

    def exchange(self, part: Tensor) -> Tensor:
        """Hand over `part` (..., n), of at most `round_length` elements.

        Returns:
            The parts of all ranks (ranks, ..., n), to be read before the next call. The memory is
            that of the ranks: do not write.
        """
        half = self._halves[self._round % 2].view(part.dtype)[:, : part.numel()]
        self._round += 1
        parts = half.view(-1, *part.shape)
        parts[self._group.rank()] = part
        dist.barrier(group=self._group)
        return parts


def _create() -> Path | None:
    """Make the file; None if there is no room or no such file system."""
    try:
        descriptor, path = tempfile.mkstemp(prefix="fastllama-", dir=FOLDER)
    except OSError:
        return None
    try:
        # Without this a full file system would kill the process at its first write.
        os.posix_fallocate(descriptor, 0, SIZE)
    except OSError:
        os.unlink(path)
        return None
    finally:
        os.close(descriptor)
    return Path(path)


def _map(path: Path) -> mmap.mmap | None:
    """Map the file; None if this machine has no such file."""
    try:
        with path.open("r+b") as file:
            return mmap.mmap(file.fileno(), SIZE)
    except OSError:
        return None
