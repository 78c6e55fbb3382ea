"""The files of tensors in a checkpoint: which tensor is in which file, and how a file is written.

They are what PyTorch's `HuggingFaceStorageWriter` writes, and its reader reads them. That writer
serialises a whole file before it writes it: it holds two copies in memory, and Python's global
lock, so that training launches no kernel.
"""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from fastllama.atomic import fsync_file, naming
from fastllama.checkpoints.folder import FileEntry
from fastllama.safetensors_file import write_safetensors

FILE_BYTES = 64 * 2**20
"""Size of the tensors in one file of a rank, unless a single one is larger.

Ranks and threads share the writing and the checking of a checkpoint file by file.
"""
THREADS = 4
"""Files that a rank writes or checks at once. SHA-256 takes a core as long as the file itself."""


def file_numbers(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The file number, from 1, of each tensor; the same on every rank."""
    numbers = {}
    number, filled = 1, 0
    for name, tensor in sorted(tensors.items()):
        # Not the local size, which differs between ranks when a split is uneven.
        size = tensor.nbytes // _n_shards(tensor)
        if filled and filled + size > FILE_BYTES:
            number, filled = number + 1, 0
        numbers[name] = number
        filled += size
    return numbers


def _n_shards(tensor: Tensor) -> int:
    if not isinstance(tensor, DTensor):
        return 1
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return math.prod(size for size, placement in sizes if placement.is_shard())


def file_name(rank: int, number: int, n_files: int) -> str:
    """Name of the file with this number of a rank."""
    return f"shard-{rank + 1:05d}-model-{number:05d}-of-{n_files:05d}.safetensors"


class ShardWriter(HuggingFaceStorageWriter):
    """Lets `dcp.save` write the files of this rank, tensor by tensor, from host memory."""

    def __init__(self, folder: Path, numbers: Mapping[str, int]) -> None:
        """Write into `folder`, which is there. `numbers` has the file number of each tensor."""
        super().__init__(str(folder), save_distributed=True)
        self.files: dict[str, FileEntry] = {}
        """The files written, by name."""
        self._folder, self._numbers = folder, numbers

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the tensors that the planner has given to this rank.

        Raises:
            OSError: a file cannot be written.
        """
        parts = defaultdict(list)
        for item in plan.items:
            parts[self._numbers[item.index.fqn]].append(item)
        with ThreadPoolExecutor(THREADS) as threads:
            write = partial(self._write_file, planner)
            self.files = dict(threads.map(write, parts.keys(), parts.values()))
        # The results only serve an index file, which a checkpoint in shards does not have.
        results: Future[list[WriteResult]] = Future()
        results.set_result([])
        return results

    def _write_file(
        self, planner: SavePlanner, number: int, items: Sequence[WriteItem]
    ) -> tuple[str, FileEntry]:
        name = file_name(dist.get_rank(), number, max(self._numbers.values()))
        tensors, offsets = {}, {}
        for item in items:
            tensor, piece = planner.resolve_data(item), item.tensor_data
            assert isinstance(tensor, Tensor)
            assert piece is not None
            tensors[item.index.fqn], offsets[item.index.fqn] = tensor, piece.chunk.offsets
        return name, write_shard(self._folder / name, tensors, tensors.values(), offsets)


def write_shard(
    path: Path,
    layout: Mapping[str, Tensor],
    values: Iterable[Tensor],
    offsets: Mapping[str, Sequence[int]],
) -> FileEntry:
    """Write one file of a checkpoint and flush it to the disk.

    Args:
        path: the file, which is not there.
        layout: the tensors by name; only their shapes and dtypes are read.
        values: their values in this order.
        offsets: where each begins in the whole tensor, by name.

    Raises:
        OSError: the file cannot be written.
    """
    # As PyTorch's reader expects it.
    sharding = {name: {"saved_offsets": list(offsets[name])} for name in layout}
    metadata = {
        "DCP_SHARDING_INFO": json.dumps(sharding),
        "DCP_VERSION": "1.0",
        "format": "pt",
    }
    with naming(path), open(path, "xb") as file:
        hashed = _HashedFile(file)
        write_safetensors(hashed, layout, values, metadata)
        size = file.tell()
    fsync_file(path)
    return FileEntry(size, hashed.sha256())


class _HashedFile:
    """Hashes what is written into a file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest = file, hashlib.sha256()

    def write(self, content: bytes | memoryview) -> None:
        self._digest.update(content)
        self._file.write(content)

    def sha256(self) -> str:
        return self._digest.hexdigest()
