"""The data folder that a command writes, from its lock to its manifest."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from hashlib import blake2b
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from fastllama.atomic import locked
from fastllama.data.manifest import MANIFEST_FILE, TOKENIZER_FILE, Manifest, Split
from fastllama.data.prepare_state import (
    InputRecord,
    JobRecord,
    PrepareProgress,
    check_tokenizer,
    delete_folder,
    delete_progress,
    delete_unused_shards,
    record_next_shard,
    reject_other_files,
    restore_progress,
)
from fastllama.data.remote_files import RemoteFile, check_unchanged
from fastllama.data.shards import SplitWriter
from fastllama.data.tokenizer import fingerprint, save_tokenizer, vocabulary_size
from fastllama.data.trees import InputFile
from fastllama.printable import printable, shortened


def check_output(output: Path) -> None:
    """Raise ValueError if `output` is a file."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"output {output} is not a folder: choose another --output")


@contextmanager
def writing_into(output: Path) -> Iterator[None]:
    """Create and lock the folder `output`.

    If the block fails, a new folder is deleted, unless it holds recorded work.

    Raises:
        ValueError: `output` holds other files, or another process writes into it.
    """
    is_new = not output.exists()
    output.mkdir(parents=True, exist_ok=True)
    # Before the lock, which would add a file to a folder of other files.
    reject_other_files(output)
    with locked(output):
        try:
            yield
        except BaseException:
            if is_new:
                delete_folder(output)
            raise


def describe_input(path: InputFile) -> InputRecord:
    """An input file as `job.json` records it, or one behind a URL as it was when it was found.

    Raises:
        ValueError: the file is gone.
    """
    if not isinstance(path, Path):
        return printable(path), path.size, path.version
    try:
        status = path.stat()
    except OSError as error:
        raise ValueError(
            f"the input file {shortened(printable(path), 300)} cannot be read any more "
            f"({error.strerror}): restore it with its time of modification, and run the same "
            "command again"
        ) from None
    # JSON holds no bytes that are not UTF-8.
    return printable(path), status.st_size, status.st_mtime_ns


def check_inputs(paths: Sequence[InputFile], recorded: Sequence[InputRecord]) -> None:
    """Check that input files are still as they were recorded at the start.

    Raises:
        ValueError: a file is gone or was changed.
        OSError: the network fails.
    """
    check_unchanged(path for path in paths if isinstance(path, RemoteFile))
    for path, description in zip(paths, recorded, strict=True):
        if describe_input(path) != description:
            raise ValueError(
                f"the input file {shortened(printable(path), 300)} was changed while it was "
                "read: restore it with its time of modification and run the same command "
                "again, or delete the output folder and prepare the data again"
            )


def split_of(content: bytes, validation_fraction: float) -> str:
    """Choose the split by a hash of the content, so exact copies never fall into both splits."""
    draw = int.from_bytes(blake2b(content, digest_size=8).digest(), "big") / 2**64
    return "validation" if draw < validation_fraction else "train"


def complete_manifest(output: Path) -> Manifest | None:
    """The manifest of `output`, whose files have the right sizes; None before it is complete.

    Raises:
        ValueError: the manifest or a shard is damaged.
    """
    if not (output / MANIFEST_FILE).exists():
        return None
    manifest = Manifest.load(output)
    manifest.check_files(output)
    delete_progress(output)
    return manifest


def open_writers(
    output: Path, job: JobRecord, tokenizer: Tokenizer
) -> tuple[PrepareProgress, dict[str, SplitWriter]]:
    """The recorded progress of `output`, and a writer for each split that continues it.

    Raises:
        ValueError: a file of the folder is damaged or in the way.
    """
    if not check_tokenizer(output, job):
        save_tokenizer(tokenizer, output / TOKENIZER_FILE)
    progress = restore_progress(output, job)
    dtype = token_dtype(tokenizer)
    writers: dict[str, SplitWriter] = {
        name: SplitWriter(
            output, name, job.shard_tokens, split, dtype, partial(record_next_shard, output, name)
        )
        for name, split in progress.splits.items()
    }
    delete_unused_shards(output, progress)
    return progress, writers


def complete_folder(
    output: Path,
    job: JobRecord,
    tokenizer: Tokenizer,
    progress: PrepareProgress,
    writers: dict[str, SplitWriter],
) -> Manifest:
    """Complete the open shards, and write the manifest."""
    for writer in writers.values():
        if writer.progress.open_tokens:
            writer.complete_shard()
    manifest = Manifest(
        dtype=token_dtype(tokenizer).name,
        vocab_size=vocabulary_size(tokenizer),
        end_token_id=job.end_token_id,
        tokenizer_fingerprint=fingerprint(tokenizer),
        skipped_records=progress.read.malformed,
        # `join` adds the characters of all parts.
        text_loss=progress.text_loss if progress.text_loss.lost or job.part else None,
        splits={
            name: Split(split.tokens, split.documents, split.text_bytes, tuple(writer.shards))
            for name, writer in writers.items()
            if (split := writer.progress).tokens
        },
    )
    manifest.check_files(output)
    manifest.save(output)
    delete_progress(output)
    return manifest


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """The narrowest dtype for the token ids: uint16 or uint32."""
    return np.dtype("uint16" if vocabulary_size(tokenizer) <= 2**16 else "uint32")
