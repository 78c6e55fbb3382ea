"""Checkpoints: what is in one, whether it is whole, and how it is loaded.

    checkpoints/step-00000512/
        shard-00001-model-….safetensors   of rank 0, one or more; any number of ranks reads them
        progress.json                     step, position in the data, counters, identity
        manifest.json                     size and SHA-256 of each file; written last
    checkpoints/latest -> step-00000512

A checkpoint is written under a hidden name, made durable, and renamed: a folder called step-… is
complete (`writing.py`). Nothing in it is a pickle, so loading one runs no code of
whoever wrote it.
"""

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


def find_damage(path: Path, wanted: str = "") -> str | None:
    """Read a checkpoint against its manifest; say what is wrong, or None.

    Files without a tensor whose name begins with `wanted` need only be of the right size. The
    ranks of a run, which all call this, read a share each and hear the same.
    """
    if not dist.is_initialized():
        return _find_damage_in_share(path, 0, 1, wanted)
    rank, size = dist.get_rank(), dist.get_world_size()
    return _agreed(_find_damage_in_share(path, rank, size, wanted))


def _find_damage_in_share(path: Path, rank: int, size: int, wanted: str) -> str | None:
    manifest = path / "manifest.json"
    try:
        entries = dict(json.loads(manifest.read_text())["files"])
        names = sorted(entries, key=lambda name: entries[name]["bytes"])
        whole = "progress.json" in names and all(name == Path(name).name for name in names)
        # A shard that is not listed would be read all the same.
        strange = {shard.name for shard in path.glob("*.safetensors")} - entries.keys()
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        return f"{manifest} is missing or unreadable"
    if strange:
        return f"{path / min(strange)} is not in {manifest.name}"
    # Dealt out in the order of their sizes, so that the shares are alike.
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
    """Whether a file has a tensor whose name begins with `wanted`, or no header that denies it."""
    if not wanted:
        return True
    try:
        with safe_open(file, framework="pt") as tensors:
            names = tensors.keys()
        return any(name.startswith(wanted) for name in names)
    except SafetensorError:
        return True


def _agreed(wrong: str | None) -> str | None:
    """The first complaint of any rank, on all of them."""
    complaints: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(complaints, wrong)
    return next((complaint for complaint in complaints if complaint is not None), None)


def newest_checkpoint(
    folder: Path, identity: dict[str, Any], wanted: str = ""
) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint that is whole and of this identity, and why newer ones are not used.

    The ranks of a run call this together; `wanted` is that of `find_damage`.

    Raises:
        ValueError: all that are whole belong to a run of another identity.
    """
    paths = [complete_checkpoints(folder)]
    if dist.is_initialized():
        # A file system shared by the nodes may show another what is removed already.
        dist.broadcast_object_list(paths)
    passed_over: dict[Path, str] = {}
    foreign = None
    for path in paths[0]:
        wrong = find_damage(path, wanted)
        if wrong is None:
            wrong = find_difference(path, identity)
            foreign = foreign or wrong
        if wrong is None:
            return path, passed_over
        passed_over[path] = wrong
    if foreign is not None:
        raise ValueError(
            f"{foreign}; keep that value to resume, or start a new run with --run-dir."
        )
    return None, passed_over


def find_difference(path: Path, identity: dict[str, Any]) -> str | None:
    """What keeps an undamaged checkpoint from being one of a run with `identity`, or None."""
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
    """What kind of run an undamaged checkpoint is of."""
    return _read(path)[0]


def _read(path: Path) -> tuple[dict[str, Any], TrainProgress]:
    content = json.loads((path / "progress.json").read_text())
    return dict(content["identity"]), TrainProgress(**content["progress"])


def load_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors`, whole or sharded in any way, with the values saved under their names.

    Raises:
        ValueError: the checkpoint lacks one of them, or it cannot be read.
    """
    with warnings.catch_warnings():
        # One process without a group is the normal case of generation.
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
    """What went wrong on the first process where something did."""
    return next(iter(error.failures.values()))[0]
