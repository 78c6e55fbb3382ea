"""Checkpoints of update 0: weights that no training of this run has made, without moments."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from fastllama.atomic import fsync_folder, naming
from fastllama.checkpoints.folder import complete_checkpoints, describe, point_latest
from fastllama.checkpoints.reading import first_failure
from fastllama.checkpoints.state import TrainProgress
from fastllama.checkpoints.writing import complete, file_numbers
from fastllama.run_folder import RunFolder


def write_weights(
    folder: Path,
    shapes: dict[str, Tensor],
    load: Callable[[str], Tensor],
    identity: dict[str, Any],
) -> Path:
    """Write the checkpoint of update 0 into a folder of checkpoints, in this process alone.

    One file after the other is loaded and written, so host memory holds a file three times.

    Args:
        folder: the folder of checkpoints.
        shapes: tensors on the meta device by checkpoint name.
        load: returns the values of a name: float32, on the CPU, with the shape in `shapes`.
        identity: the options that a resumed run may not change, as far as they are known.

    Returns:
        The checkpoint.

    Raises:
        OSError: a file cannot be written.
    """
    final = folder / "step-00000000"
    aside = final.with_name(f".{final.name}.partial")
    aside.mkdir()
    numbers = file_numbers(shapes)
    names_of: dict[int, list[str]] = {}
    for name, number in numbers.items():
        names_of.setdefault(number, []).append(name)
    for names in names_of.values():
        _write_file(aside, numbers, {name: load(name) for name in names})
    complete(aside, final, TrainProgress(), identity, describe(aside, os.listdir(aside)))
    fsync_folder(folder)
    point_latest(final)
    return final


def _write_file(folder: Path, numbers: dict[str, int], tensors: dict[str, Tensor]) -> None:
    """Write the tensors of one file; `numbers` has the file number of each tensor of all files."""
    writer = HuggingFaceStorageWriter(
        str(folder), fqn_to_index_mapping=numbers, save_distributed=True
    )
    with warnings.catch_warnings(), naming(folder):
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.save(tensors, storage_writer=writer, no_dist=True)
        except CheckpointException as error:
            failure = first_failure(error)
            raise (failure if isinstance(failure, OSError) else OSError(str(failure))) from None


def refuse_resume(run: RunFolder, checkpoint: Path | None) -> None:
    """Raise ValueError if `checkpoint`, or all that the run has, holds weights only."""
    paths = complete_checkpoints(run.checkpoints) if checkpoint is None else [checkpoint]
    # A training saves none before its first update.
    if paths and all(path.name == "step-00000000" for path in paths):
        raise ValueError(
            f"{run.path} has weights without the moments of AdamW, so there is nothing to resume; "
            f"start a new run from them with --training.init-from {run.path}."
        )
