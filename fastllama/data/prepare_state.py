"""The state of a preparation on disk: what resumes, and which files may be deleted.

Files of the data folder record the state: `job.json` holds the inputs and settings, `progress.json`
the position up to which every token is durable, `train.sha256` and `validation.sha256` the
checksums of complete shards, and `manifest.json`, written last, marks the data as complete.
`progress.json` also counts the shard files before they are created. Only shards in this count and
the lists of such shards are deleted; every other file of the folder is left alone.
"""

import dataclasses
import hashlib
import json
import os
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from fastllama.atomic import LOCK_FILE, write_atomic
from fastllama.data.accounting import ReadCounts
from fastllama.data.checksummed_json import read_checksummed, write_checksummed
from fastllama.data.documents import START, Position
from fastllama.data.manifest import (
    MANIFEST_FILE,
    TOKENIZER_FILE,
    damaged,
    sha256_of,
)
from fastllama.data.parts import Part, parts_in
from fastllama.data.records import MAX_DOCUMENT_MB
from fastllama.data.shard_list import ShardList, list_path, shard_name
from fastllama.data.shards import SplitProgress
from fastllama.data.text_loss import TextLoss
from fastllama.data.tokenizer import fingerprint, load_tokenizer
from fastllama.printable import printable
from fastllama.typed_json import DamagedFileError, read_json

JOB_FILE = "job.json"
PROGRESS_FILE = "progress.json"
PROGRESS_VERSION = 3
InputRecord = tuple[str, int, int | str]
"""Path, size in bytes and time of modification in nanoseconds of an input file.

Of a file behind a URL, the last is its version.
"""
SplitName = Literal["train", "validation"]
SPLITS: tuple[SplitName, ...] = ("train", "validation")


@dataclass(frozen=True)
class JobRecord:
    """The content of `job.json`. It determines every byte of the result."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    inputs: tuple[InputRecord, ...]
    field: str
    tokenizer: str  # its fingerprint
    end_token_id: int
    validation_fraction: float
    shard_tokens: int
    max_document_mb: int = MAX_DOCUMENT_MB
    part: Part | None = None
    all_inputs: str | None = None  # of a part: `digest_of` the inputs of all parts
    # Of `data import`: how its token files are read, and those of the validation split.
    format: str | None = None
    validation_inputs: tuple[InputRecord, ...] | None = None
    # `InputFiles.commits`. The names in `inputs` hold the commits, too, so that jobs compare.
    commits: dict[str, str] | None = dataclasses.field(default=None, compare=False)

    @classmethod
    def load(cls, output: Path) -> "JobRecord | None":
        """Read the job of `output`; None if the folder has no `job.json`.

        Raises:
            ValueError: the file is damaged, or is the `job.json` of another program.
        """
        path = output / JOB_FILE
        if not os.path.lexists(path):
            return None
        if not path.is_file():
            raise ValueError(f"{path} is not a file: choose another --output")
        try:
            return read_json(path, cls)
        except DamagedFileError as error:
            raise DamagedFileError(
                f"{error}; the file is damaged, or `fastllama prepare` did not write it: restore "
                "it, or choose another --output"
            ) from None

    def save(self, output: Path) -> None:
        """Write `job.json` atomically."""
        content = {name: value for name, value in asdict(self).items() if value is not None}
        write_atomic(output / JOB_FILE, json.dumps(content, indent=2) + "\n")


@dataclass
class PrepareProgress:
    """The shards hold all documents before `position`. `read` counts the records.

    `forced_cuts` counts the cuts inside words that are too long to be encoded in one piece.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    format_version: Annotated[int, Field(ge=PROGRESS_VERSION)] = PROGRESS_VERSION
    position: Position = START
    read: ReadCounts = dataclasses.field(default_factory=ReadCounts)
    text_loss: TextLoss = dataclasses.field(default_factory=TextLoss)
    forced_cuts: int = 0
    splits: dict[SplitName, SplitProgress] = dataclasses.field(
        default_factory=lambda: {name: SplitProgress() for name in SPLITS}
    )

    @classmethod
    def load(cls, output: Path) -> "PrepareProgress":
        """Read the progress of `output`. A folder without a record is at the beginning.

        Raises:
            ValueError: the record is damaged, or an older fastllama wrote it.
        """
        path = output / PROGRESS_FILE
        if not os.path.lexists(path):
            return cls()
        try:
            if not path.is_file():
                raise DamagedFileError(f"{path} is not a file")
            progress = read_checksummed(path, cls, PROGRESS_VERSION)
            if contradiction := progress._contradiction():
                raise DamagedFileError(f"{path}: {contradiction}")
        except DamagedFileError as error:
            raise DamagedFileError(
                f"{error}; it is damaged, or another version of fastllama wrote it: finish with "
                f"this version, or delete {output} and prepare the data again"
            ) from None
        return progress

    def save(self, output: Path) -> None:
        """Write `progress.json` atomically."""
        write_checksummed(output / PROGRESS_FILE, asdict(self))

    @property
    def documents(self) -> int:
        return sum(split.documents for split in self.splits.values())

    @property
    def tokens(self) -> int:
        return sum(split.tokens for split in self.splits.values())

    def _contradiction(self) -> str | None:
        """What no `prepare` records; None if all is well."""
        if min(self.position) < 0:
            return f"position {tuple(self.position)} is negative"
        if self.splits.keys() != set(SPLITS):
            return f"it does not have the splits {', '.join(SPLITS)}"
        for name, split in self.splits.items():
            if split.created < split.used:
                return f"the split {name} has {split.used} shards, of {split.created} created"
        return None


def digest_of(inputs: Sequence[InputRecord]) -> str:
    """SHA-256 (hex) of a list of inputs."""
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()


def recorded_commits(output: Path) -> Mapping[str, str]:
    """The commits of the hub's data sets that the job in `output` reads, or one of its parts.

    Raises:
        ValueError: a `job.json` is damaged.
    """
    if not output.is_dir():
        return {}
    for folder in (output, *(output / part.folder for part in parts_in(output))):
        if (job := JobRecord.load(folder)) is not None:
            return job.commits or {}
    return {}


def record_next_shard(output: Path, name: SplitName) -> None:
    """Count the next shard file of split `name` in `progress.json`, before it is created."""
    recorded = PrepareProgress.load(output)
    recorded.splits[name].created += 1
    recorded.save(output)


def reject_other_files(output: Path) -> None:
    """Raise ValueError if `output` holds files, but no job of `fastllama prepare`."""
    if parts_in(output) and not os.path.lexists(output / MANIFEST_FILE):
        raise ValueError(
            f"{output} holds parts: prepare the others with --part, and run `fastllama data join "
            f"{output}` when all are complete, or choose another --output"
        )
    present = _visible_names(output)
    if present and JobRecord.load(output) is None:
        raise _holds_other_files(output, present[0])


def reject_other_parts(folder: Path, part: Part, job: JobRecord) -> None:
    """Raise ValueError if `folder` holds anything but parts of as many, joined or not yet.

    One other part is compared with `job`; the join compares all. Other machines may add their parts
    at the same time.
    """
    # Read first: of the names in it, no part is missing in the list of parts.
    present = _visible_names(folder)
    parts = parts_in(folder)
    for other in parts:
        if other.count != part.count:
            raise ValueError(
                f"{folder} holds part {other}, and part {part} belongs to another number of parts: "
                "prepare as many parts as before, delete the folder, or choose another --output"
            )
    for other in parts:
        path = folder / other.folder
        if other != part and (found := JobRecord.load(path)) is not None:
            if changed := differing_settings(found, job):
                raise ValueError(
                    f"{path} was prepared by another command ({', '.join(changed)} differ from "
                    f"{JOB_FILE}): use the same files and settings for all parts, or delete that "
                    "folder if it is wrong"
                )
            break
    if not parts and JOB_FILE in present and JobRecord.load(folder) is not None:
        raise ValueError(
            f"{folder} is the data folder of a single process: choose another --output for parts, "
            "or leave --part out"
        )
    joined = {JOB_FILE, MANIFEST_FILE, TOKENIZER_FILE} if parts else set()
    if others := set(present) - joined - {other.folder for other in parts}:
        raise _holds_other_files(folder, min(others))


def differing_settings(one: JobRecord, other: JobRecord) -> list[str]:
    """Names of the fields in which the jobs of two parts differ, though one command makes both."""
    return [
        field.name
        for field in dataclasses.fields(JobRecord)
        if field.compare
        and field.name not in ("inputs", "part")
        and getattr(one, field.name) != getattr(other, field.name)
    ]


def _visible_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def _holds_other_files(folder: Path, name: str) -> ValueError:
    return ValueError(
        f"{folder} holds other files ({printable(name)}): choose another --output, or empty the "
        "folder"
    )


def claim_folder(output: Path, job: JobRecord) -> None:
    """Write the record of `job` to `output`.

    The shards of another job that recorded no progress are deleted.

    Raises:
        ValueError: `output` holds recorded work of another job.
    """
    earlier = JobRecord.load(output)
    if earlier == job:
        return
    if earlier is not None:
        if has_recorded_work(output):
            settings = [field.name for field in dataclasses.fields(job) if field.compare]
            changed = [name for name in settings if getattr(job, name) != getattr(earlier, name)]
            raise ValueError(
                f"{output} holds data of another job ({', '.join(changed)} differ from "
                f"{JOB_FILE}): choose another --output, or delete the folder"
            )
        _delete_work(output, earlier)
    job.save(output)


def has_recorded_work(output: Path) -> bool:
    """Whether `output` holds complete data, or tokens that resume."""
    if os.path.lexists(output / MANIFEST_FILE):
        return True
    return PrepareProgress.load(output).position != START


def check_tokenizer(output: Path, job: JobRecord) -> bool:
    """Return whether `output` has the tokenizer of `job`.

    Raises:
        ValueError: the folder has another file of this name.
    """
    path = output / TOKENIZER_FILE
    if not os.path.lexists(path):
        return False
    with suppress(ValueError):
        if fingerprint(load_tokenizer(path)) == job.tokenizer:
            return True
    raise ValueError(
        f"{path} is damaged or not the tokenizer of this job: move it elsewhere, and run the same "
        "command again"
    )


def restore_progress(output: Path, job: JobRecord) -> PrepareProgress:
    """Read the progress of `output`, and check its complete shards.

    Raises:
        ValueError: the progress or a shard is damaged.
    """
    progress = PrepareProgress.load(output)
    record = output / PROGRESS_FILE
    if progress.position.file > len(job.inputs):
        raise damaged(record, f"input file {progress.position.file}", f"{len(job.inputs)} files")
    for counts in progress.read.files:
        if not 0 <= counts.file < len(job.inputs):
            raise damaged(record, f"input file {counts.file}", f"{len(job.inputs)} files")
    for name, split in progress.splits.items():
        if split.open_tokens >= job.shard_tokens:
            raise damaged(record, f"{split.open_tokens} tokens", f"less than {job.shard_tokens}")
        tokens = split.complete * job.shard_tokens + split.open_tokens
        if split.tokens != tokens:
            raise damaged(record, f"{split.tokens} tokens", f"{tokens}")
        listed = ShardList(output, name, split.complete, split.list_sha256, job.shard_tokens)
        for shard in listed.shards:
            path = output / shard.file
            found = sha256_of(path) if path.is_file() else "no such file"
            if found != shard.sha256:
                raise damaged(path, f"SHA-256 {found}", shard.sha256)
    return progress


def delete_unused_shards(output: Path, progress: PrepareProgress) -> None:
    """Delete the shards that were created after `progress`, and record that they are gone.

    Raises:
        ValueError: one of them is not a file.
    """
    for path in _unused_shards(output, progress):
        if not stat.S_ISREG(path.lstat().st_mode):
            raise ValueError(
                f"{path} is in the way: it is a link or a special file; move it elsewhere"
            )
        path.unlink()
    if any(split.created > split.used for split in progress.splits.values()):
        for name, split in progress.splits.items():
            if split.created and not split.used:
                list_path(output, name).unlink(missing_ok=True)
            split.created = split.used
        progress.save(output)


def discard_work(output: Path, progress: PrepareProgress) -> None:
    """Record that the shards of `progress` are not worth keeping: another job may replace them."""
    discarded = PrepareProgress()
    for name, split in progress.splits.items():
        discarded.splits[name].created = split.created
    discarded.save(output)


def delete_progress(output: Path) -> None:
    """Delete `progress.json` and the lists of shards, unless another program wrote them."""
    with suppress(DamagedFileError):
        for name, split in PrepareProgress.load(output).splits.items():
            if split.created:
                list_path(output, name).unlink(missing_ok=True)
        (output / PROGRESS_FILE).unlink(missing_ok=True)


def delete_folder(output: Path) -> None:
    """Delete what a failed job without recorded work wrote into `output`, its new folder.

    Files that `prepare` did not write stay, and the folder with them.
    """
    # The error of the job matters, not that of its clean-up.
    with suppress(OSError, ValueError):
        job = JobRecord.load(output)
        if job is not None and not has_recorded_work(output):
            _delete_work(output, job)
            (output / JOB_FILE).unlink()
        if set(os.listdir(output)) <= {LOCK_FILE}:
            (output / LOCK_FILE).unlink(missing_ok=True)
            output.rmdir()


def _delete_work(output: Path, job: JobRecord) -> None:
    """Delete shards, tokenizer and progress of `job`, which recorded no work."""
    delete_unused_shards(output, PrepareProgress.load(output))
    tokenizer = output / TOKENIZER_FILE
    with suppress(ValueError):
        if tokenizer.exists() and fingerprint(load_tokenizer(tokenizer)) == job.tokenizer:
            tokenizer.unlink()
    delete_progress(output)


def _unused_shards(output: Path, progress: PrepareProgress) -> list[Path]:
    # Of the names in the folder: the count may be any number in a damaged file.
    present = {path.name: path for path in output.iterdir()}
    return [
        path
        for name, split in progress.splits.items()
        for number in range(split.used, min(split.created, split.used + len(present)))
        if (path := present.get(shard_name(name, number)))
    ]
