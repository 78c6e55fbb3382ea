"""Joins parts of a preparation: one manifest names the shards of all of them. No bytes move.

The joined folder has the job of a preparation by one process, and the same streams of tokens.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fastllama.atomic import locked
from fastllama.console import Console
from fastllama.data.manifest import (
    JOINED_VERSION,
    MANIFEST_FILE,
    TOKENIZER_FILE,
    Manifest,
    Shard,
    Split,
    damaged,
)
from fastllama.data.notices import all_held_out, notices
from fastllama.data.parts import Part, parts_in
from fastllama.data.prepare_state import (
    JOB_FILE,
    SPLITS,
    JobRecord,
    check_tokenizer,
    differing_settings,
    digest_of,
)
from fastllama.data.text_loss import TextLoss
from fastllama.data.tokenizer import save_tokenizer


@dataclass(frozen=True)
class CompletePart:
    """The content of a part's folder."""

    folder: Path
    job: JobRecord
    manifest: Manifest


def join(folder: Path) -> Manifest:
    """Write the manifest of all parts in `folder`, and return it. Reads no tokens.

    A call on a folder that is joined already checks that its parts are the same.

    Raises:
        ValueError: `folder` is missing or has no parts; parts are missing, incomplete, damaged, or
            of different inputs or settings; or all of them together have no training tokens.
        OSError: reading or writing fails.
    """
    console = Console(stderr=True)
    expected = _expected_parts(folder)
    with locked(folder):
        parts = [_complete_part(folder, part) for part in expected]
        job = _joined_job(folder, parts)
        manifest = _joined_manifest(parts)
        documents = sum(split.documents for split in manifest.splits.values())
        if not documents:
            raise ValueError(
                f"the parts in {folder} have no document: every record is empty or malformed, for "
                "the reasons that `fastllama prepare` printed"
            )
        if "train" not in manifest.splits:
            raise ValueError(all_held_out(documents, job.validation_fraction))
        if os.path.lexists(folder / MANIFEST_FILE):
            if Manifest.load(folder) != manifest:
                raise ValueError(
                    f"{folder / MANIFEST_FILE} does not describe the parts as they are now: delete "
                    "it, if the parts are right, and join again"
                )
            console.print(f"{folder} is already complete")
        else:
            _write(folder, parts[0], job, manifest)
    for line in notices(manifest, job.validation_fraction):
        console.print(line)
    return manifest


def _expected_parts(folder: Path) -> list[Part]:
    """All parts, of the number that the parts in `folder` name."""
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist"
        raise ValueError(f"{folder} {problem}: name the --output of `fastllama prepare --part`")
    found = parts_in(folder)
    if not found:
        if os.path.lexists(folder / MANIFEST_FILE):
            raise ValueError(f"{folder} has no parts, and its data needs no join")
        raise ValueError(f"{folder} has no parts: make them with `fastllama prepare --part`")
    for part in found:
        if part.count != found[0].count:
            raise ValueError(
                f"{folder} holds {found[0].folder} and {part.folder}: delete the folders of the "
                "parts that do not belong to the data"
            )
    present = set(found)
    expected = [Part(number, found[0].count) for number in range(1, found[0].count + 1)]
    if missing := [part for part in expected if part not in present]:
        first = ", ".join(map(str, missing[:5])) + (", …" if len(missing) > 5 else "")
        raise ValueError(
            f"{folder} lacks {len(missing):,} of {len(expected):,} parts ({first}): prepare them "
            "with --part, and join again"
        )
    return expected


def _complete_part(folder: Path, part: Part) -> CompletePart:
    """Read a part, and check its files, but not its tokens."""
    path = folder / part.folder
    if not os.path.lexists(path / MANIFEST_FILE):
        # The lock tells a part that is being prepared from one that was interrupted.
        with locked(path):
            raise ValueError(
                f"{path} is not complete: run its command with --part {part} again, and join after "
                "that"
            )
    job = JobRecord.load(path)
    if job is None:
        raise damaged(path / JOB_FILE, "no such file", "the job of the part")
    if job.part != part or job.all_inputs is None:
        raise damaged(path / JOB_FILE, f"part {job.part}", str(part))
    manifest = Manifest.load(path)
    if manifest.tokenizer_fingerprint != job.tokenizer:
        raise damaged(path / JOB_FILE, "another tokenizer", f"that of {path / MANIFEST_FILE}")
    manifest.check_files(path)
    return CompletePart(path, job, manifest)


def _joined_job(folder: Path, parts: Sequence[CompletePart]) -> JobRecord:
    """The job of a single process that prepares all parts."""
    first = parts[0]
    for part in parts:
        if changed := differing_settings(part.job, first.job):
            raise ValueError(
                f"{part.folder} and {first.folder} were not prepared by the same command "
                f"({', '.join(changed)} differ in {JOB_FILE}): delete the wrong part, and prepare "
                "it again"
            )
    inputs = tuple(record for part in parts for record in part.job.inputs)
    if digest_of(inputs) != first.job.all_inputs:
        raise ValueError(
            f"the inputs in {JOB_FILE} of the parts in {folder} are not those of the whole: a file "
            f"{JOB_FILE} was changed; restore it, or prepare the data again"
        )
    return replace(first.job, inputs=inputs, part=None, all_inputs=None)


def _joined_manifest(parts: Sequence[CompletePart]) -> Manifest:
    loss = TextLoss()
    for part in parts:
        loss.merge(part.manifest.text_loss or TextLoss())
    splits = {name: _joined_split(name, parts) for name in SPLITS}
    return replace(
        parts[0].manifest,
        format_version=JOINED_VERSION,
        skipped_records=sum(part.manifest.skipped_records for part in parts),
        text_loss=loss if loss.lost else None,
        splits={name: split for name, split in splits.items() if split.tokens},
    )


def _joined_split(name: str, parts: Sequence[CompletePart]) -> Split:
    tokens = documents = text_bytes = 0
    shards: list[Shard] = []
    for part in parts:
        if (split := part.manifest.splits.get(name)) is not None:
            tokens += split.tokens
            documents += split.documents
            text_bytes += split.text_bytes
            shards += (
                replace(shard, file=f"{part.folder.name}/{shard.file}") for shard in split.shards
            )
    return Split(tokens, documents, text_bytes, tuple(shards))


def _write(folder: Path, part: CompletePart, job: JobRecord, manifest: Manifest) -> None:
    if JobRecord.load(folder) not in (None, job):
        raise ValueError(
            f"{folder / JOB_FILE} is the job of other data than the parts: move it elsewhere, and "
            "join again"
        )
    has_tokenizer = check_tokenizer(folder, job)
    # The job first: beside it, the other files are no input documents.
    job.save(folder)
    if not has_tokenizer:
        save_tokenizer(part.manifest.open_tokenizer(part.folder), folder / TOKENIZER_FILE)
    manifest.save(folder)
