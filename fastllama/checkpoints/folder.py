"""The folder of checkpoints: names, checksums, and which checkpoints are kept.

    checkpoints/step-00000512/
        shard-00001-model-….safetensors   one or more per rank; any number of ranks can read them
        progress.json                     step, position in the data, counters, identity
        manifest.json                     size and SHA-256 of each file; written last
    checkpoints/latest -> step-00000512

A checkpoint is written under a hidden name, made durable, and renamed, so a folder named step-… is
complete. Nothing in it is a pickle: loading a checkpoint executes no code from it.
"""

import contextlib
import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fastllama.atomic import fsync_folder
from fastllama.config import Config


def describe(folder: Path, pattern: str) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of the files that match `pattern`, as the manifest lists them."""
    entries = {}
    for path in sorted(folder.glob(pattern)):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            entries[path.name] = {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}
    return entries


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, newest first."""
    return sorted(
        (path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8}", path.name)),
        reverse=True,
    )


def step_of(checkpoint: Path) -> int:
    """The update after which a checkpoint was saved."""
    return int(checkpoint.name.removeprefix("step-"))


def set_aside(path: Path) -> Path:
    """Rename a checkpoint that is not used, so that it neither counts nor is overwritten.

    It stays on disk: its weights may be worth a rescue, or belong to another run.
    """
    number = 1
    while (aside := path.with_name(f"passed-over-{path.name}-{number}")).exists():
        number += 1
    os.replace(path, aside)
    fsync_folder(path.parent)
    return aside


def point_latest(checkpoint: Path) -> None:
    """Point the link `latest` at `checkpoint`, which lies beside it."""
    aside = checkpoint.with_name(".latest.partial")
    aside.unlink(missing_ok=True)
    aside.symlink_to(checkpoint.name)
    os.replace(aside, checkpoint.with_name("latest"))


def mend_latest(newest: Path) -> None:
    """Point `latest` at the newest whole checkpoint, if a kill came between rename and link."""
    if dist.get_rank() == 0 and newest.with_name("latest").resolve() != newest.resolve():
        # A finished run may be on a read-only disk by now.
        with contextlib.suppress(OSError):
            point_latest(newest)


def remove_old(newest: Path, config: Config) -> None:
    """Remove checkpoints older than `newest` that `config.checkpoint` does not keep, oldest first.

    Newer checkpoints stay.
    """
    paths = [path for path in reversed(complete_checkpoints(newest.parent)) if path <= newest]
    kept = {*paths[-config.checkpoint.keep_last :], *permanent(paths, config)}
    for path in paths:
        if path not in kept:
            # Renamed first, so that a half-removed folder never looks complete.
            doomed = path.with_name(f".{path.name}.removed")
            os.replace(path, doomed)
            shutil.rmtree(doomed)


def permanent(paths: list[Path], config: Config) -> list[Path]:
    """The first of `paths`, oldest first, at or after each multiple of `keep_every_tokens`."""
    interval, per_update = config.checkpoint.keep_every_tokens, config.training.tokens_per_update
    found: list[Path] = []
    multiple = 0
    for path in paths if interval else ():
        passed = step_of(path) * per_update // interval
        if passed > multiple:
            found.append(path)
            multiple = passed
    return found
