"""What an import, a merge or an export writes: complete, or not there."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastllama.atomic import LOCK_FILE, fsync_folder, locked, naming, replace, write_atomic
from fastllama.run_folder import RunFolder
from fastllama.typed_json import DamagedFileError, read_regular


def refuse_output(output: Path) -> None:
    """Raise ValueError if `output` exists or cannot be created."""
    if os.path.lexists(output):
        raise ValueError(f"output {output} exists: choose another --output")
    if output.name == "..":
        raise ValueError(f"output {output} ends in no name: choose another --output")
    nearest = next(path for path in output.absolute().parents if os.path.lexists(path))
    if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
        raise ValueError(
            f"output {output} cannot be written because {nearest} is not a writable folder: choose "
            "another --output"
        )


@contextmanager
def new_run(output: Path) -> Iterator[RunFolder]:
    """A run folder under a hidden name, renamed to `output` at the end, or removed."""
    run = RunFolder(output.with_name(f".{output.name}.partial"))
    with run.locked("--output"):
        # What a killed command left.
        _empty(run.path)
        try:
            yield run
            replace(run.path, output)
        except BaseException:
            _empty(run.path)
            raise
        fsync_folder(output.parent)


@contextmanager
def new_path(output: Path) -> Iterator[Path]:
    """A path in a hidden folder, renamed to `output` at the end; after an error nothing is left.

    The caller writes a file or a folder there, and flushes it.

    Raises:
        ValueError: another process writes `output`.
    """
    hidden = output.with_name(f".{output.name}.partial")
    created = [folder for folder in hidden.absolute().parents if not folder.exists()]
    try:
        hidden.mkdir(parents=True, exist_ok=True)
        with locked(hidden):
            # What a killed command left.
            _empty(hidden)
            try:
                with naming(output):
                    yield hidden / output.name
                replace(hidden / output.name, output)
            finally:
                shutil.rmtree(hidden)
    except BaseException:
        for folder in created:
            # Something else may be in it by now.
            with suppress(OSError):
                folder.rmdir()
        raise
    fsync_folder(output.parent)


def keep_tokenizer_model(source: Path, target: Path) -> None:
    """Copy the SentencePiece model of a tokenizer unread, if there is one.

    fastllama needs only the tokenizer.json. Without the model, llama.cpp's converter silently
    writes a tokenizer without scores, which splits text differently.

    Raises:
        ValueError: `source` is not a regular file, or too large.
        OSError: a file cannot be read or written.
    """
    if not os.path.lexists(source):
        return
    try:
        content = read_regular(source)
    except DamagedFileError as error:
        raise ValueError(f"{error}; restore it, or remove it.") from None
    write_atomic(target, content)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != LOCK_FILE:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
