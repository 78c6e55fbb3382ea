"""Reading checkpoints: finding damage, finding the newest one of a run, loading tensors."""

import logging
import os
import stat
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from fastllama.atomic import report_once
from fastllama.checkpoints.folder import (
    CheckpointManifest,
    FileEntry,
    complete_checkpoints,
    describe,
    locate,
)
from fastllama.checkpoints.shards import THREADS
from fastllama.checkpoints.state import EMA, MODEL, TrainProgress, TrainState
from fastllama.config import Config
from fastllama.printable import one_line
from fastllama.run_folder import RunFolder, model_identity
from fastllama.typed_json import DamagedFileError, read_json


@dataclass(frozen=True)
class SavedProgress:
    """The content of progress.json."""

    progress: TrainProgress
    identity: dict[str, Any]
    """The options that a resumed run may not change."""


def newest_checkpoint(
    folder: Path,
    identity: dict[str, Any],
    wanted: str = "",
    remedy: str = "keep that value to resume, or start a new run with --run-dir",
) -> tuple[Path | None, dict[Path, str]]:
    """The newest whole checkpoint with this identity, and why each newer one is not used.

    All ranks of a run call this together. `wanted` is the argument of `find_damage`.

    Raises:
        ValueError: every whole checkpoint has another identity; the message ends with `remedy`.
        OSError: the folder cannot be read.
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
        raise ValueError(f"{foreign}; {remedy}.")
    return None, unusable


def find_checkpoint(path: Path, wanted: str = MODEL) -> tuple[RunFolder, Path]:
    """The run and the whole checkpoint that `path` names: a run folder names its newest one.

    `wanted` is the argument of `find_damage`. All ranks of a run call this together.

    Raises:
        ValueError: there is no run, no checkpoint, or no whole one, it has another model than
            config.toml, or it lacks averaged weights that are wanted.
    """
    run, checkpoint = locate(path)
    model = run.load_config().model
    if checkpoint is None:
        checkpoint, unusable = newest_checkpoint(
            run.checkpoints, model_identity(model), wanted, f"restore that value in {run.config}"
        )
        if checkpoint is None:
            raise ValueError(no_checkpoint(run, unusable))
        for reason in unusable.values():
            report_once(reason, f"Not using a checkpoint: {reason}.")
    elif not checkpoint.is_dir():
        raise ValueError(missing_checkpoint(checkpoint))
    elif damage := find_damage(checkpoint, wanted):
        raise ValueError(
            f"The checkpoint is damaged: {damage}; use another one of {checkpoint.parent}."
        )
    elif difference := find_difference(checkpoint, model_identity(model)):
        raise ValueError(f"{difference}; restore that value in {run.config}.")
    refuse_missing_average(checkpoint, wanted)
    return run, checkpoint


def no_checkpoint(run: RunFolder, unusable: dict[Path, str]) -> str:
    """A sentence for a run without a whole checkpoint."""
    if not unusable:
        return f"{run.path} has no checkpoint yet; train on, or wait for the first."
    return f"{run.path} has no whole checkpoint: {'; '.join(unusable.values())}."


def missing_checkpoint(checkpoint: Path) -> str:
    """A sentence for a checkpoint that is not there, with those that are."""
    there = [path.name for path in complete_checkpoints(checkpoint.parent)]
    return (
        f"There is no checkpoint {checkpoint}; {checkpoint.parent} has "
        f"{', '.join(there) or 'none'}."
    )


def refuse_missing_average(checkpoint: Path, wanted: str) -> None:
    """Raise ValueError if averaged weights are wanted and the checkpoint has none."""
    if wanted == EMA and not has_tensors(checkpoint, EMA):
        raise ValueError(
            f"{checkpoint} has no average of the weights; leave out --ema, or train with "
            "training.ema_decay."
        )


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
        entries = read_json(manifest, CheckpointManifest).files
        # The reader would load a shard that is not listed.
        shards = {name for name in os.listdir(path) if name.endswith(".safetensors")}
    except FileNotFoundError:
        return f"{manifest} is missing"
    except OSError as error:
        return f"{manifest} cannot be read: {error.strerror}"
    except DamagedFileError as error:
        return str(error)
    strange = next((name for name in entries if not _is_file_name(name)), None)
    if strange is not None:
        return f"{manifest} lists {one_line(repr(strange), 60)}, which is not a file name"
    if "progress.json" not in entries:
        return f"{manifest} does not list progress.json"
    if unlisted := shards - entries.keys():
        return f"{path / min(unlisted)} is not in {manifest.name}"
    # Dealt out in order of size, so that all ranks read about as much.
    names = sorted(entries, key=lambda name: entries[name].bytes)[rank::size]
    with ThreadPoolExecutor(THREADS) as threads:
        damages = threads.map(lambda name: _damage(path / name, entries[name], wanted), names)
        return next((damage for damage in damages if damage is not None), None)


def _damage(file: Path, entry: FileEntry, wanted: str) -> str | None:
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            return f"{file} is not a regular file"
        whole = status.st_size == entry.bytes
        if whole and _may_hold(file, wanted):
            whole = describe(file.parent, [file.name])[file.name] == entry
    except FileNotFoundError:
        return f"{file} is missing"
    except OSError as error:
        return f"{file} cannot be read: {error.strerror}"
    return None if whole else f"{file} is not what was written"


def _is_file_name(name: str) -> bool:
    return name not in ("", ".", "..") and not {"/", "\0"} & set(name)


def _may_hold(file: Path, wanted: str) -> bool:
    """Whether a file may hold a tensor whose name begins with `wanted`."""
    if not wanted:
        return True
    # safetensors calls a file missing that it may not open.
    with open(file, "rb"):
        pass
    try:
        with utf8_path(file) as path, safe_open(path, framework="pt") as tensors:
            names = tensors.keys()
        return any(name.startswith(wanted) for name in names)
    except SafetensorError:
        return True


# Of checkpoints that are older than an option, and do not name it.
_BEFORE_THE_OPTION: dict[str, Any] = {
    "data.document_mask": False,
    "data.stages": [],
    "data.weights": [],
}


def find_difference(path: Path, identity: dict[str, Any]) -> str | None:
    """Return why an undamaged checkpoint does not belong to a run with `identity`, or None."""
    try:
        saved = read_identity(path)
    except DamagedFileError as error:
        return str(error)
    except OSError as error:
        return f"{path / 'progress.json'} cannot be read: {error.strerror}"
    for name, value in identity.items():
        trained = saved.get(name, _BEFORE_THE_OPTION.get(name))
        if trained != value:
            if name == "data.fingerprint":
                return _difference_of_data(path, str(trained), str(value))
            if name == "data.stages":
                name += " (start_tokens, max_seq_len, theta)"
            if name == "data.weights":
                name = "weights of data.sources"
                trained, value = (
                    ", then ".join(str(weights) for _, weights in each)
                    for each in (trained or (), value)
                )
            now = one_line(value, 100)
            return f"{path} was trained with {name} = {one_line(trained, 100)}, not {now}"
    return None


def _difference_of_data(path: Path, trained: str, now: str) -> str:
    """A clause about a checkpoint of other data, with the folder that the run had."""
    folder = ""
    with suppress(ValueError, OSError):
        folder = RunFolder(path.parent.parent).load_config().data.path
    data = f"data.path = {folder}, which had the" if folder else "data of the"
    return f"{path} was trained with {data} fingerprint {trained[:12]}, not {now[:12]}"


def read_progress(path: Path) -> TrainProgress:
    """Progress of an undamaged checkpoint.

    Raises:
        DamagedFileError: progress.json does not hold the progress of a run.
    """
    return read_json(path / "progress.json", SavedProgress).progress


def stage_config(config: Config, checkpoint: Path) -> Config:
    """The configuration of a run in the stage in which an undamaged checkpoint was saved.

    Raises:
        DamagedFileError: progress.json does not hold the progress of a run.
    """
    return config.at(read_progress(checkpoint).step) if config.data.stages else config


def read_end_token(path: Path, vocab_size: int) -> int:
    """Id of the token that ends a document, from an undamaged checkpoint.

    Raises:
        ValueError: there is none, or it is not in the vocabulary.
    """
    return _token(path, vocab_size, "data.end_token_id")


def read_start_token(path: Path, vocab_size: int) -> int | None:
    """Id of the token in front of every document, from an undamaged checkpoint.

    Only imported models have one. The data that fastllama prepares has none.

    Raises:
        ValueError: it is not in the vocabulary.
    """
    if "data.start_token_id" not in read_identity(path):
        return None
    return _token(path, vocab_size, "data.start_token_id")


def _token(path: Path, vocab_size: int, name: str) -> int:
    token = read_identity(path).get(name)
    if type(token) is not int or not 0 <= token < vocab_size:
        raise ValueError(
            f"{path / 'progress.json'}: {name} = {token!r} is not one of the {vocab_size} token "
            "ids."
        )
    return token


def read_identity(path: Path) -> dict[str, Any]:
    """Identity of the run that saved an undamaged checkpoint.

    Raises:
        DamagedFileError: progress.json does not hold the progress of a run.
    """
    return read_json(path / "progress.json", SavedProgress).identity


def has_tensors(path: Path, prefix: str) -> bool:
    """Whether an undamaged checkpoint has tensors whose names begin with `prefix`."""
    return any(_may_hold(file, prefix) for file in path.glob("*.safetensors"))


def load_state(path: Path, state: TrainState) -> None:
    """Load weights, moments and average of an undamaged checkpoint into `state`.

    If the checkpoint has no average, the average of `state` starts with the weights.

    Raises:
        ValueError: the checkpoint lacks a tensor, or it cannot be read.
    """
    has_average = has_tensors(path, EMA)
    tensors = state.tensors()
    if not has_average:
        tensors = {name: value for name, value in tensors.items() if not name.startswith(EMA)}
    load_tensors(path, tensors)
    if state.average is not None and not has_average:
        state.average.restart()


def load_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Load the saved values into `tensors` in place, by name; they may be sharded in any way.

    Raises:
        ValueError: the checkpoint lacks a tensor, or it cannot be read.
    """
    with utf8_path(path) as name:
        _load(path, tensors, HuggingFaceStorageReader(name))


def _load(path: Path, tensors: dict[str, Tensor], reader: HuggingFaceStorageReader) -> None:
    with warnings.catch_warnings(), _without_traceback():
        # Generation loads in one process without a process group.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
        except CheckpointException as error:
            raise ValueError(f"{path} cannot be loaded: {first_failure(error)}") from None


@contextmanager
def open_tensors(path: Path) -> Iterator[Callable[[str, torch.Size], Tensor]]:
    """A function that reads one tensor of an undamaged checkpoint, of this name and shape.

    The function raises ValueError if the checkpoint lacks the tensor or cannot be read.
    """
    with utf8_path(path) as name:
        reader = _HeadersOnce(name)

        def read(tensor: str, shape: torch.Size) -> Tensor:
            values = torch.empty(shape)
            _load(path, {tensor: values}, reader)
            return values

        yield read


class _HeadersOnce(HuggingFaceStorageReader):
    """Reads the headers of all files for the first tensor only."""

    _headers: Metadata | None = None

    def read_metadata(self) -> Metadata:
        if self._headers is None:
            self._headers = super().read_metadata()
        return self._headers


@contextmanager
def utf8_path(path: Path) -> Iterator[str]:
    """A name of a file or folder in UTF-8, for safetensors, which opens no other."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            yield f"/dev/fd/{descriptor}"
        finally:
            os.close(descriptor)
    else:
        yield str(path)


@contextmanager
def _without_traceback() -> Iterator[None]:
    """Drop the traceback that PyTorch logs before it raises an error of reading."""
    root = logging.getLogger()

    def is_other(record: logging.LogRecord) -> bool:
        return record.module != "state_dict_loader"

    root.addFilter(is_other)
    try:
        yield
    finally:
        root.removeFilter(is_other)


def first_failure(error: CheckpointException) -> BaseException:
    """The exception of the first rank that failed."""
    return next(iter(error.failures.values()))[0]
