"""Checkpoints of update 0: weights that no training of this run has made, without moments."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from fastllama.atomic import fsync_folder
from fastllama.checkpoints.folder import complete_checkpoints, point_latest
from fastllama.checkpoints.shards import file_name, file_numbers, write_shard
from fastllama.checkpoints.state import TrainProgress
from fastllama.checkpoints.writing import complete
from fastllama.run_folder import RunFolder


def write_weights(
    folder: Path,
    shapes: dict[str, Tensor],
    load: Callable[[str], Tensor],
    identity: dict[str, Any],
) -> Path:
    """Write the checkpoint of update 0 into a folder of checkpoints, in this process alone.

    One tensor after the other is loaded and written.

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
    parts: dict[int, dict[str, Tensor]] = {}
    for name, number in file_numbers(shapes).items():
        parts.setdefault(number, {})[name] = shapes[name]
    files = {}
    for number, part in parts.items():
        path = aside / file_name(0, number, len(parts))
        offsets = {name: [0] * tensor.dim() for name, tensor in part.items()}
        files[path.name] = write_shard(path, part, map(load, part), offsets)
    complete(aside, final, TrainProgress(), identity, files)
    fsync_folder(folder)
    point_latest(final)
    return final


def refuse_resume(run: RunFolder, checkpoint: Path | None) -> None:
    """Raise ValueError if `checkpoint`, or all that the run has, holds weights only."""
    paths = complete_checkpoints(run.checkpoints) if checkpoint is None else [checkpoint]
    # A training saves none before its first update.
    if paths and all(path.name == "step-00000000" for path in paths):
        raise ValueError(
            f"{run.path} has weights without the moments of AdamW, so there is nothing to resume; "
            f"start a new run from them in another folder with --training.init-from {run.path}."
        )
