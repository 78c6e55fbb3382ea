"""Saving checkpoints while training continues.

Between two updates each rank copies its tensors to host memory. A thread of each rank writes them.

`dcp.async_save` is not used. It is experimental in every supported PyTorch, and its return type
differs between them. A checkpoint is also complete only with its checksums, its manifest and its
rename, which need the same thread and the same process group once more.
"""

import contextlib
import copy
import dataclasses
import errno
import json
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
from torch.distributed.checkpoint.api import CheckpointException

from fastllama.atomic import fsync_folder, replace, write_atomic
from fastllama.checkpoints.folder import (
    CheckpointManifest,
    FileEntry,
    complete_checkpoints,
    describe,
    make_way,
    point_latest,
    remove_files,
    remove_leftovers,
    remove_old,
)
from fastllama.checkpoints.reading import first_failure
from fastllama.checkpoints.remote import CheckpointUploader
from fastllama.checkpoints.shards import ShardWriter, file_numbers
from fastllama.checkpoints.state import TrainProgress
from fastllama.config import Config
from fastllama.planning.out_of_memory import is_out_of_memory

Result = TypeVar("Result")

UPLOAD_STEP_S = 10.0


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time. Every rank has one; all call it together."""

    def __init__(
        self,
        folder: Path,
        config: Config,
        identity: dict[str, Any],
        device: torch.device,
        report: Callable[[str], None],
        uploader: CheckpointUploader | None = None,
    ) -> None:
        """Save into `folder`; call `report` with one sentence for each checkpoint, saved or failed.

        `identity` holds the options that a resumed run may not change. `uploader`, which only the
        main process has, gets each complete checkpoint.
        """
        self.saved_step: int | None = None
        """The update of the last complete checkpoint."""
        self.failure = ""
        """Why the last failed checkpoint could not be written."""
        self._folder, self._config, self._identity = folder, config, identity
        self._device, self._report = device, report
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        # A separate group, so that the threads' collectives never mix with training's. It keeps
        # PyTorch's own timeout, because ranks may finish their files minutes apart.
        self._group = dist.new_group(backend="gloo")
        self._is_main = dist.get_rank() == 0
        self._uploader = uploader

    def save(self, tensors: dict[str, Tensor], progress: TrainProgress) -> None:
        """Wait for the previous save, copy the tensors to host memory, and start writing them.

        After the return the caller may change `tensors` and `progress`.
        """
        start = time.perf_counter()
        self.wait()
        staged = self._stage(tensors)
        self._thread = threading.Thread(
            target=self._run,
            args=(staged, copy.deepcopy(progress), time.perf_counter() - start),
            name="checkpoint",
            daemon=True,
        )
        self._thread.start()

    def _stage(self, tensors: dict[str, Tensor]) -> dict[str, Tensor] | OSError:
        """Copy the tensors to host memory; return an error if it is too small for them."""
        try:
            # A non-blocking copy from CUDA goes to pinned memory.
            staged = {
                name: tensor.to("cpu", non_blocking=True, copy=True)
                for name, tensor in tensors.items()
            }
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            first_line = str(error).partition("\n")[0] or type(error).__name__
            return OSError(f"the host has no memory for a copy ({first_line})")
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return staged

    def wait(self) -> None:
        """Wait until no save is in progress. `saved_step` and `failure` then hold its outcome.

        Raises:
            RuntimeError: another rank is gone or does not answer.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def finish_uploads(self) -> None:
        """Wait for the last upload, and report if it failed. All ranks call it together."""
        if not self._config.checkpoint.upload:
            return
        uploader = self._uploader
        # In short steps: an upload may take longer than a collective may wait.
        while not all(self._on_each(lambda: uploader is None or uploader.wait(UPLOAD_STEP_S))):
            pass
        if uploader is not None and uploader.failure:
            self._report(f"{uploader.failure}; resume the run, or copy the checkpoint yourself.")

    def _run(
        self, staged: dict[str, Tensor] | OSError, progress: TrainProgress, seconds: float
    ) -> None:
        start = time.perf_counter()
        if self._device.type == "cuda":
            # A new thread starts on GPU 0, where a call of PyTorch's could create a context.
            torch.cuda.set_device(self._device)
        final = self._folder / f"step-{progress.step:08d}"
        aside = final.with_name(f".{final.name}.partial")
        try:
            self._write_or_free_disk(self._staged_everywhere(staged), progress, aside, final)
            self.saved_step = progress.step
            written = time.perf_counter() - start
            self._report(f"saved {final} ({seconds:.2f} s staged, {written:.2f} s written)")
            # All ranks wait: torchrun ends all of them when the first one exits.
            self._on_main(lambda: self._tidy(final))
            if self._uploader is not None:
                self._uploader.upload(final)
        except OSError as error:
            if self._is_main:
                with contextlib.suppress(OSError):
                    remove_files(aside)
            reason = error.strerror or error
            self.failure = f"The checkpoint {final} could not be written: {reason}"
            # After the last update, `SideJobs.finish` raises it.
            if progress.step < self._config.n_updates:
                self._report(
                    f"{self.failure}; training continues, and the next one is due as planned."
                )
        except Exception as error:  # handed to the training thread, which raises it
            self._error = error

    def _staged_everywhere(self, staged: dict[str, Tensor] | OSError) -> dict[str, Tensor]:
        """This rank's copy; raise OSError on every rank if one has none."""
        self._on_each(lambda: staged if isinstance(staged, OSError) else None)
        assert not isinstance(staged, OSError)
        return staged

    def _write_or_free_disk(
        self, staged: dict[str, Tensor], progress: TrainProgress, aside: Path, final: Path
    ) -> None:
        """Write; on a full disk first remove the checkpoint that this one replaces, and try again.

        An older checkpoint always stays.
        """
        try:
            self._write(staged, progress, aside, final)
        except OSError as error:
            # Every rank has the same error.
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            removed = self._on_each(lambda: self._remove_replaced() if self._is_main else [])[0]
            if not removed:
                raise
            self._report(
                f"The disk is full: removed {', '.join(removed)} before saving {final.name}."
            )
            self._write(staged, progress, aside, final)

    def _remove_replaced(self) -> list[str]:
        """Remove what `remove_old` will remove after the next checkpoint; return the names."""
        before = complete_checkpoints(self._folder)
        n_kept = self._config.checkpoint.keep_last - 1
        if not 0 < n_kept < len(before):
            return []
        remove_old(before[0], self._config, n_kept)
        after = complete_checkpoints(self._folder)
        return [path.name for path in before if path not in after]

    def _write(
        self, staged: dict[str, Tensor], progress: TrainProgress, aside: Path, final: Path
    ) -> None:
        self._on_main(lambda: self._make_room(aside))
        writer = ShardWriter(aside, file_numbers(staged))
        try:
            # The planner lets one replica write. `save` returns when the files are durable.
            dcp.save(staged, storage_writer=writer, process_group=self._group)
        except CheckpointException as error:
            failure = first_failure(error)
            if isinstance(failure, OSError) or not isinstance(failure, (MemoryError, RuntimeError)):
                raise failure from None
            # No memory, or no thread. Training may go on.
            raise OSError(str(failure) or "the host has no memory left") from None
        parts = self._on_each(lambda: writer.files)
        files = {name: entry for part in parts for name, entry in part.items()}
        self._on_main(lambda: complete(aside, final, progress, self._identity, files))

    def _make_room(self, aside: Path) -> None:
        # Without parents, so that a deleted run folder does not reappear.
        self._folder.mkdir(exist_ok=True)
        remove_leftovers(self._folder)
        make_way(aside)
        aside.mkdir()

    def _tidy(self, newest: Path) -> None:
        try:
            # The new checkpoint must be durable before an older one is removed.
            fsync_folder(self._folder)
            point_latest(newest)
            remove_old(newest, self._config)
        except OSError as error:
            self._report(f"Checkpoints before {newest} are not removed: {error.strerror}.")

    def _on_main(self, compute: Callable[[], None]) -> None:
        self._on_each(compute if self._is_main else lambda: None)

    def _on_each(self, compute: Callable[[], Result]) -> list[Result]:
        """Call `compute` on every rank; return all results.

        Raises:
            OSError: the first that `compute` raises or returns on any rank.
        """
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
        # The staged copy is valid, whatever ended the run.
        if self._thread is not None:
            self._thread.join()
        if self._uploader is not None:
            self._uploader.wait()


def complete(
    aside: Path,
    final: Path,
    progress: TrainProgress,
    identity: dict[str, Any],
    files: dict[str, FileEntry],
) -> None:
    """Add progress and manifest to the `files` of tensors in `aside`, and rename it to `final`."""
    content = {"progress": dataclasses.asdict(progress), "identity": identity}
    write_atomic(aside / "progress.json", json.dumps(content, indent=2))
    manifest = CheckpointManifest(files | describe(aside, ["progress.json"]))
    write_atomic(aside / "manifest.json", json.dumps(dataclasses.asdict(manifest), indent=2))
    make_way(final)
    replace(aside, final)
