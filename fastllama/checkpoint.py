"""Checkpoints: tensors by torch.distributed.checkpoint as safetensors, the rest as JSON.

    checkpoints/step-00000512/
        shard-00001-model-….safetensors   the part of rank 0, and so on; any number of ranks reads
        progress.json                     step, position in the data, counters, identity
        manifest.json                     size and SHA-256 of each file; written last
    checkpoints/latest -> step-00000512

A checkpoint is written under a hidden name, made durable, and renamed: a folder called step-… is
complete. Nothing in it is a pickle, so loading one runs no code of whoever wrote it.
"""

import hashlib
import json
import os
import shutil
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from fastllama.atomic import fsync_folder, write_atomic


@dataclass
class Progress:
    """How far a run has come; with the weights and moments, all a resumed run needs."""

    step: int = 0
    """Optimizer updates done, refused ones included."""
    position: int = 0
    """Sequences consumed since the run began."""
    skipped_steps: int = 0
    """Updates refused because loss or gradient norm was not finite."""
    skipped_in_a_row: int = 0
    """Refused updates since the last good one."""


def model_tensors(model: nn.Module) -> dict[str, Any]:
    """The weights by the names they have in a checkpoint; the values are the live tensors."""
    return {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}


def training_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Weights and AdamW's state by checkpoint name; the values are the live tensors."""
    tensors = model_tensors(model)
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = value
    return tensors


def save_checkpoint(
    folder: Path, tensors: dict[str, Tensor], progress: Progress, identity: dict[str, Any]
) -> Path:
    """Write `folder`/step-… from every rank and point `latest` at it.

    `identity` is what must not change for the progress to mean the same (`read_progress`).

    Raises:
        OSError: the disk is full or read-only; earlier checkpoints are untouched.
    """
    final = folder / f"step-{progress.step:08d}"
    aside = folder / f".{final.name}.partial"
    is_main = dist.get_rank() == 0
    if is_main:
        for leftover in (*folder.glob(".step-*.partial"), *folder.glob(".step-*.removed")):
            shutil.rmtree(leftover)
        aside.mkdir(parents=True)
    dist.barrier()
    try:
        dcp.save(
            tensors, storage_writer=HuggingFaceStorageWriter(str(aside), save_distributed=True)
        )
    except CheckpointException as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(
            f"The checkpoint {final} could not be written: {first_failure(error)}"
        ) from None
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, _describe(aside, f"shard-{dist.get_rank() + 1:05d}-*"))
    if is_main:
        content = {"progress": asdict(progress), "identity": identity}
        write_atomic(aside / "progress.json", json.dumps(content, indent=2))
        files = {name: entry for part in parts for name, entry in part.items()}
        files |= _describe(aside, "progress.json")
        write_atomic(aside / "manifest.json", json.dumps({"files": files}, indent=2))
        if final.exists():
            shutil.rmtree(final)
        os.replace(aside, final)
        _point_latest(folder, final.name)
        fsync_folder(folder)
    dist.barrier()
    return final


def _describe(folder: Path, pattern: str) -> dict[str, dict[str, Any]]:
    """Size and checksum of the files that match, made durable on the way."""
    entries = {}
    for path in sorted(folder.glob(pattern)):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        entries[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
    return entries


def _point_latest(folder: Path, name: str) -> None:
    aside = folder / ".latest.partial"
    aside.unlink(missing_ok=True)
    aside.symlink_to(name)
    os.replace(aside, folder / "latest")


def remove_old(newest: Path, keep_last: int) -> None:
    """Remove all but `newest`, just saved, and the `keep_last` - 1 before it, oldest first.

    One after it can only be damaged, or the run would have gone on from there: it goes as well.
    """
    complete = _complete(newest.parent)
    kept = [path for path in complete if path.name <= newest.name][:keep_last]
    for path in reversed([path for path in complete if path not in kept]):
        # Renamed first, so that a half-removed folder never looks complete.
        doomed = path.with_name(f".{path.name}.removed")
        os.replace(path, doomed)
        shutil.rmtree(doomed)


def _complete(folder: Path) -> list[Path]:
    """Checkpoints that were finished, newest first."""
    return sorted(folder.glob("step-*"), reverse=True)


def find_damage(path: Path) -> str | None:
    """Read a whole checkpoint against its manifest; say what is wrong, or None."""
    try:
        expected = dict(json.loads((path / "manifest.json").read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"{path / 'manifest.json'} is missing or unreadable"
    for name, entry in expected.items():
        if not (path / name).is_file():
            return f"{path / name} is missing"
        if _describe(path, name)[name] != entry:
            return f"{path / name} is not what was written"
    return None


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint of a run, and what is wrong with the newer ones."""
    damage: list[str] = []
    for path in _complete(folder):
        wrong = find_damage(path)
        if wrong is None:
            return path, damage
        damage.append(wrong)
    return None, damage


def read_progress(path: Path, identity: dict[str, Any]) -> Progress:
    """Progress of a checkpoint.

    Raises:
        ValueError: it belongs to a run of another identity.
    """
    content = json.loads((path / "progress.json").read_text())
    for name, value in identity.items():
        if content["identity"].get(name) != value:
            raise ValueError(
                f"{path} was trained with {name} = {content['identity'].get(name)}, not {value}; "
                "keep that value to resume, or start a new run with --run-dir."
            )
    return Progress(**content["progress"])


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
