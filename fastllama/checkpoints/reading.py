"""Reading checkpoints: finding damage, finding the newest one of a run, loading tensors."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.api import CheckpointException

from fastllama.checkpoints.folder import complete_checkpoints, describe
from fastllama.checkpoints.state import TrainProgress


def newest_checkpoint(
    folder: Path, identity: dict[str, Any], wanted: str = ""
) -> tuple[Path | None, dict[Path, str]]:
    """The newest whole checkpoint with this identity, and why each newer one is not used.

    All ranks of a run call this together. `wanted` is the argument of `find_damage`.

    Raises:
        ValueError: every whole checkpoint has another identity.
    """
    paths = [complete_checkpoints(folder)]
    if dist.is_initialized():
        # On a shared file system a node may still list a folder that another node has removed.
        dist.broadcast_object_list(paths)
    unusable: dict[Path, str] = {}
    foreign = None
    for path in paths[0]:
        reason = find_damage(path, wanted)
        if reason is None:
            reason = find_difference(path, identity)
            foreign = foreign or reason
        if reason is None:
            return path, unusable
        unusable[path] = reason
    if foreign is not None:
        raise ValueError(
            f"{foreign}; keep that value to resume, or start a new run with --run-dir."
        )
    return None, unusable


def find_damage(path: Path, wanted: str = "") -> str | None:
    """Check a checkpoint against its manifest; return what is wrong, or None.

    Checksums are compared for files that may hold a tensor whose name begins with `wanted`. Of
    other files only the sizes are compared. All ranks of a run call this together: each reads a
    share of the files, and all return the same.
    """
    if not dist.is_initialized():
        return _find_damage_in_share(path, 0, 1, wanted)
    rank, size = dist.get_rank(), dist.get_world_size()
    damages: list[str | None] = [None] * size
    dist.all_gather_object(damages, _find_damage_in_share(path, rank, size, wanted))
    return next((damage for damage in damages if damage is not None), None)


def _find_damage_in_share(path: Path, rank: int, size: int, wanted: str) -> str | None:
    manifest = path / "manifest.json"
    try:
        entries = dict(json.loads(manifest.read_text())["files"])
        names = sorted(entries, key=lambda name: entries[name]["bytes"])
        whole = "progress.json" in names and all(name == Path(name).name for name in names)
        # The reader would load a shard that is not listed.
        unlisted = {shard.name for shard in path.glob("*.safetensors")} - entries.keys()
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        return f"{manifest} is missing or unreadable"
    if unlisted:
        return f"{path / min(unlisted)} is not in {manifest.name}"
    # Dealt out in order of size, so that all ranks read about as much.
    for name in names[rank::size]:
        try:
            whole = (path / name).stat().st_size == entries[name]["bytes"]
            if whole and _may_hold(path / name, wanted):
                whole = describe(path, name).get(name) == entries[name]
        except FileNotFoundError:
            return f"{path / name} is missing"
        except OSError as error:
            return f"{path / name} cannot be read: {error.strerror}"
        if not whole:
            return f"{path / name} is not what was written"
    return None


def _may_hold(file: Path, wanted: str) -> bool:
    """Whether a file may hold a tensor whose name begins with `wanted`."""
    if not wanted:
        return True
    try:
        with safe_open(file, framework="pt") as tensors:
            names = tensors.keys()
        return any(name.startswith(wanted) for name in names)
    except SafetensorError:
        return True


def find_difference(path: Path, identity: dict[str, Any]) -> str | None:
    """Return why an undamaged checkpoint does not belong to a run with `identity`, or None."""
    try:
        saved, _ = _read(path)
    except (OSError, ValueError, KeyError, TypeError):
        return f"{path / 'progress.json'} does not hold the progress of a run"
    for name, value in identity.items():
        if saved.get(name) != value:
            return f"{path} was trained with {name} = {saved.get(name)}, not {value}"
    return None


def read_progress(path: Path) -> TrainProgress:
    """Progress of an undamaged checkpoint."""
    return _read(path)[1]


def read_identity(path: Path) -> dict[str, Any]:
    """Identity of the run that saved an undamaged checkpoint."""
    return _read(path)[0]


def _read(path: Path) -> tuple[dict[str, Any], TrainProgress]:
    content = json.loads((path / "progress.json").read_text())
    return dict(content["identity"]), TrainProgress(**content["progress"])


def load_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Load the saved values into `tensors` in place, by name; they may be sharded in any way.

    Raises:
        ValueError: the checkpoint lacks a tensor, or it cannot be read.
    """
    with warnings.catch_warnings():
        # Generation loads in one process without a process group.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.load(
                tensors,
                storage_reader=HuggingFaceStorageReader(str(path)),
                no_dist=not dist.is_initialized(),
            )
        except CheckpointException as error:
            raise ValueError(f"{path} cannot be loaded: {first_failure(error)}") from None


def first_failure(error: CheckpointException) -> BaseException:
    """The exception of the first rank that failed."""
    return next(iter(error.failures.values()))[0]
