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
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from fastllama.atomic import is_folder, replace, report_once, set_aside, write_atomic
from fastllama.config import Config
from fastllama.run_folder import RunFolder

NAME = re.compile(r"step-[0-9]{8}")
LEFTOVER = re.compile(r"\.step-[0-9]{8}\.(partial|removed)")
FILE = re.compile(
    r"shard-[0-9]{5,}-model-[0-9]{5,}-of-[0-9]{5,}\.safetensors"
    r"|(progress|manifest)\.json|\.(progress|manifest)\.json\.partial"
)
"""Names of the files that a checkpoint consists of, complete or not. Only these are deleted."""


@dataclass(frozen=True)
class FileEntry:
    """A file as the manifest lists it."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class CheckpointManifest:
    """The content of manifest.json: all other files of the checkpoint, by name."""

    files: dict[str, FileEntry]


def describe(folder: Path, names: Iterable[str]) -> dict[str, FileEntry]:
    """Size and SHA-256 of the files with these names."""
    entries = {}
    for name in sorted(names):
        with open(folder / name, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            entries[name] = FileEntry(os.fstat(file.fileno()).st_size, digest)
    return entries


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, newest first.

    A link or a file may have such a name too; reading it tells.

    Raises:
        OSError: the folder cannot be read. A folder that does not exist has no checkpoints.
    """
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted((folder / name for name in names if NAME.fullmatch(name)), reverse=True)


def locate(path: Path) -> tuple[RunFolder, Path | None]:
    """The run folder at or around `path`, and the checkpoint if `path` is one."""
    if RunFolder(path).exists:
        return RunFolder(path), None
    for target in map(Path, (os.path.abspath(path), os.path.realpath(path))):
        run = RunFolder(target.parent.parent)
        if run.exists and target.parent == run.checkpoints:
            # Followed once: a training may point `latest` elsewhere between two files.
            name = latest_name(target.parent) if target.name == "latest" else None
            return run, target.with_name(name or target.name)
    return RunFolder(path), None


def step_of(checkpoint: Path) -> int:
    """The update after which a checkpoint was saved."""
    return int(checkpoint.name.removeprefix("step-"))


def point_latest(checkpoint: Path) -> None:
    """Point the link `latest` at `checkpoint`, which is beside it.

    Where links are impossible, `latest` is a text file with the name. No reader depends on it, so a
    failure is only reported.
    """
    latest, aside = checkpoint.with_name("latest"), checkpoint.with_name(".latest.partial")
    try:
        if not latest.is_symlink() and latest_name(checkpoint.parent) is None:
            # A copy that followed the links has a folder here.
            make_way(latest)
        try:
            if is_folder(aside):
                make_way(aside)
            aside.unlink(missing_ok=True)
            aside.symlink_to(checkpoint.name)
            replace(aside, latest)
        except OSError as error:
            # A link that cannot be renamed over can be removed.
            latest.unlink(missing_ok=True)
            write_atomic(latest, f"{checkpoint.name}\n")
            report_once(
                "latest",
                f"{latest} cannot be a link ({error.strerror}); it is a text file with the name of "
                "the checkpoint.",
            )
    except OSError as error:
        report_once("latest", f"{latest} cannot be written ({error.strerror}).")


def latest_name(folder: Path) -> str | None:
    """The name of the checkpoint that `latest` points at; None if it points at no checkpoint."""
    latest = folder / "latest"
    try:
        if latest.is_symlink():
            name = os.readlink(latest)
        elif latest.is_file():
            with open(latest, encoding="utf-8") as file:
                name = file.read(100).strip()
        else:
            return None
    except (OSError, ValueError):
        return None
    return name if NAME.fullmatch(name) else None


def mend_latest(newest: Path) -> None:
    """Point `latest` at the newest whole checkpoint, if a kill came between rename and link."""
    if dist.get_rank() == 0 and latest_name(newest.parent) != newest.name:
        point_latest(newest)


def make_way(path: Path) -> None:
    """Set aside whatever has a name that is about to be written, and report it."""
    if os.path.lexists(path):
        aside = set_aside(path)
        report_once(str(path), f"{path} was in the way; it is kept as {aside.name}.")


def remove_files(folder: Path) -> None:
    """Remove the files of a checkpoint, and the folder if no other files are in it.

    Raises:
        OSError: a file cannot be removed, or other files remain.
    """
    for name in os.listdir(folder):
        if FILE.fullmatch(name):
            (folder / name).unlink()
    folder.rmdir()


def remove_leftovers(folder: Path) -> None:
    """Remove what killed saves and removals left in the folder of checkpoints."""
    for name in os.listdir(folder):
        if LEFTOVER.fullmatch(name) and is_folder(folder / name):
            with contextlib.suppress(OSError):
                remove_files(folder / name)


def remove_old(newest: Path, config: Config, n_kept: int | None = None) -> None:
    """Remove checkpoints older than `newest` that `config.checkpoint` does not keep, oldest first.

    `n_kept` replaces its `keep_last`.

    Newer checkpoints stay, and so do links, files, and folders with other files in them. What stays
    though it should go is reported.

    Raises:
        OSError: the folder of checkpoints cannot be read.
    """
    paths = [path for path in reversed(complete_checkpoints(newest.parent)) if path <= newest]
    kept = {
        *[path for path in paths if is_folder(path)][-(n_kept or config.checkpoint.keep_last) :],
        # A permanent checkpoint that was moved to another disk may be a link by now.
        *permanent([path for path in paths if path.is_dir()], config),
    }
    for path in paths:
        if path not in kept:
            _remove(path)


def _remove(path: Path) -> None:
    """Remove one checkpoint, or report why it stays."""
    try:
        if not is_folder(path):
            report_once(str(path), f"{path} is not removed: it is a link or a file.")
            return
        if other := next((name for name in os.listdir(path) if not FILE.fullmatch(name)), None):
            report_once(str(path), f"{path} is not removed: {other} is not part of a checkpoint.")
            return
        # Renamed first, so that a half-removed folder never looks complete.
        doomed = path.with_name(f".{path.name}.removed")
        make_way(doomed)
        replace(path, doomed)
        remove_files(doomed)
    except OSError as error:
        report_once(str(path), f"{path} cannot be removed ({error.strerror}).")


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
