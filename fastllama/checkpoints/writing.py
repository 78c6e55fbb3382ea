"""Saving checkpoints while training goes on: copied between updates, written by a thread a rank.

Why not `dcp.async_save`: it is experimental in every PyTorch supported here and returns a future of
another type from one to the next; and a checkpoint is complete only with its checksums, its
manifest and its rename, which need the same thread and the same process group once more.
"""

import contextlib
import copy
import dataclasses
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from fastllama.atomic import fsync_folder, write_atomic
from fastllama.checkpoints.folder import describe, point_latest, remove_old
from fastllama.checkpoints.reading import first_failure
from fastllama.checkpoints.state import TrainProgress
from fastllama.config import Config

Result = TypeVar("Result")

FILE_BYTES = 128 * 2**20
"""What a rank puts into one file, unless a single tensor is larger.

PyTorch's writer serialises a file as a whole, with Python's lock held and two copies in memory:
training launches nothing meanwhile.
"""


class CheckpointWriter:
    """Writes the checkpoints of one run, one at a time; every rank has one and calls it alike."""

    def __init__(
        self,
        folder: Path,
        config: Config,
        identity: dict[str, Any],
        device: torch.device,
        report: Callable[[str], None],
    ) -> None:
        """Save into `folder`; `report` gets a sentence for each checkpoint, written or not.

        `identity` is what must not change for the progress to mean the same.
        """
        self.saved_step: int | None = None
        """The update of the last checkpoint that is complete."""
        self.failure = ""
        """Why the last one that is not could not be written."""
        self._folder, self._config, self._identity = folder, config, identity
        self._device, self._report = device, report
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        # Of its own, so that what the threads send never mixes with training's collectives. It
        # keeps PyTorch's timeout for it: ranks may finish their files minutes apart.
        self._group = dist.new_group(backend="gloo")
        self._is_main = dist.get_rank() == 0

    def save(self, tensors: dict[str, Tensor], progress: TrainProgress) -> None:
        """Copy what is to be saved and begin to write it, once the save before is over.

        When this returns `tensors` and `progress` may change.
        """
        start = time.perf_counter()
        self.wait()
        # From CUDA, a copy that does not block is to pinned memory.
        staged = {
            name: tensor.to("cpu", non_blocking=True, copy=True) for name, tensor in tensors.items()
        }
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        self._thread = threading.Thread(
            target=self._run,
            args=(staged, copy.deepcopy(progress), time.perf_counter() - start),
            name="checkpoint",
            daemon=True,
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait until no save is under way; `saved_step` and `failure` tell how the last one went.

        Raises:
            RuntimeError: another rank is gone, or does not answer.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self, staged: dict[str, Tensor], progress: TrainProgress, seconds: float) -> None:
        start = time.perf_counter()
        if self._device.type == "cuda":
            # A new thread starts on GPU 0, and PyTorch's writer would make a context there.
            torch.cuda.set_device(self._device)
        final = self._folder / f"step-{progress.step:08d}"
        aside = final.with_name(f".{final.name}.partial")
        try:
            self._write(staged, progress, aside, final)
            self.saved_step = progress.step
            written = time.perf_counter() - start
            self._report(f"saved {final} ({seconds:.2f} s staged, {written:.2f} s written)")
            # Together as well: torchrun ends all ranks when the first one leaves.
            self._on_main(lambda: self._tidy(final))
        except OSError as error:
            if self._is_main:
                shutil.rmtree(aside, ignore_errors=True)
            self.failure = f"The checkpoint {final} could not be written: {error}"
            self._report(f"{self.failure}; the next one is tried when it is due.")
        except Exception as error:  # handed to the training thread, which raises it
            self._error = error

    def _write(
        self, staged: dict[str, Tensor], progress: TrainProgress, aside: Path, final: Path
    ) -> None:
        self._on_main(lambda: self._make_room(aside))
        writer = HuggingFaceStorageWriter(
            str(aside), fqn_to_index_mapping=file_numbers(staged), save_distributed=True
        )
        try:
            # Of equal replicas one writes, by the planner's choice; the files are durable then.
            with stream_of_its_own(self._device):
                dcp.save(staged, storage_writer=writer, process_group=self._group)
        except CheckpointException as error:
            raise OSError(str(first_failure(error))) from None
        shard = f"shard-{dist.get_rank() + 1:05d}-*"
        parts = self._on_each(lambda: describe(aside, shard))
        files = {name: entry for part in parts for name, entry in part.items()}
        self._on_main(lambda: self._complete(aside, final, progress, files))

    def _make_room(self, aside: Path) -> None:
        # Without its parents: a run folder that is gone is not one to make anew.
        self._folder.mkdir(exist_ok=True)
        for pattern in (".step-*.partial", ".step-*.removed"):
            for leftover in self._folder.glob(pattern):
                shutil.rmtree(leftover)
        aside.mkdir()

    def _complete(
        self, aside: Path, final: Path, progress: TrainProgress, files: dict[str, dict[str, Any]]
    ) -> None:
        content = {"progress": dataclasses.asdict(progress), "identity": self._identity}
        write_atomic(aside / "progress.json", json.dumps(content, indent=2))
        files = files | describe(aside, "progress.json")
        write_atomic(aside / "manifest.json", json.dumps({"files": files}, indent=2))
        os.replace(aside, final)

    def _tidy(self, newest: Path) -> None:
        try:
            # Before anything older goes.
            fsync_folder(self._folder)
            point_latest(newest)
            remove_old(newest, self._config)
        except OSError as error:
            self._report(f"Checkpoints before {newest} could not be removed: {error}")

    def _on_main(self, compute: Callable[[], None]) -> None:
        self._on_each(compute if self._is_main else lambda: None)

    def _on_each(self, compute: Callable[[], Result]) -> list[Result]:
        """What `compute` gives on every rank, on every rank; an OSError of one is one of all."""
        outcomes: list[Any] = [None] * dist.get_world_size(self._group)
        try:
            outcome: Any = compute()
        except OSError as error:
            outcome = error
        dist.all_gather_object(outcomes, outcome, group=self._group)
        for outcome in outcomes:
            if isinstance(outcome, OSError):
                raise outcome
        return outcomes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Whatever ended the run, what was staged before it is good.
        if self._thread is not None:
            self._thread.join()


def file_numbers(tensors: dict[str, Tensor]) -> dict[str, int]:
    """The number, from 1, of the file of each tensor among those of a rank; alike on every rank."""
    numbers = {}
    number, filled = 1, 0
    for name, tensor in sorted(tensors.items()):
        # Not the local size, which differs between ranks where a split is uneven.
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


def stream_of_its_own(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """What a thread does inside waits for nothing that another one launched on `device`."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    # PyTorch's writer waits for the current stream every 10 MB, even where all is in host memory,
    # and that of a new thread is the one training launches on.
    return torch.cuda.stream(torch.cuda.Stream(device))
