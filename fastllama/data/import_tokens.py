"""Makes a data folder of token files that other tools wrote, without encoding text again.

An interrupted import starts again: it copies numbers, and takes minutes where encoding takes hours.
"""

import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from fastllama.console import Console, token_bar
from fastllama.data.files import find_files
from fastllama.data.manifest import Manifest
from fastllama.data.notices import notices
from fastllama.data.output_folder import (
    check_inputs,
    check_output,
    complete_folder,
    complete_manifest,
    describe_input,
    open_writers,
    split_of,
    writing_into,
)
from fastllama.data.prepare_state import JobRecord, PrepareProgress, SplitName, claim_folder
from fastllama.data.shards import SplitWriter
from fastllama.data.text_bytes import TextBytes
from fastllama.data.token_inputs import (
    CHUNK_NUMBERS,
    LOSS,
    TOKEN_FILES,
    Format,
    TokenInput,
    open_token_inputs,
)
from fastllama.data.tokenizer import (
    end_token_id,
    fingerprint,
    load_tokenizer,
    vocabulary_size,
)
from fastllama.printable import one_line, printable, shortened
from fastllama.urls import is_url, shown

HASHED_TOKENS = 2**16
"""Tokens of a document that decide its split. A document may have any number of them."""
# val.bin of nanoGPT, fineweb_val_000000.bin of llm.c.
_VALIDATION_NAME = re.compile(r"(^|[-_.])(val|valid|validation)[-_.]", re.IGNORECASE)


@dataclass(frozen=True)
class _Job:
    """What is imported, and how."""

    inputs: dict[SplitName, list[TokenInput]]
    left_out: str
    tokenizer: Tokenizer
    end_token_id: int
    validation_fraction: float
    shard_tokens: int

    def files(self, split: SplitName) -> list[Path]:
        """All files that are read for `split`."""
        return [path for file in self.inputs[split] for path in (file.path, *file.companions)]

    def describe(self) -> JobRecord:
        """The job as `job.json` records it.

        Raises:
            ValueError: an input file is gone.
        """
        [tokens_format] = {file.format for file in self.inputs["train"]}
        return JobRecord(
            inputs=tuple(map(describe_input, self.files("train"))),
            field="",
            tokenizer=fingerprint(self.tokenizer),
            end_token_id=self.end_token_id,
            validation_fraction=self.validation_fraction,
            shard_tokens=self.shard_tokens,
            format=tokens_format,
            validation_inputs=tuple(map(describe_input, self.files("validation"))) or None,
        )


def import_tokens(
    inputs: Sequence[str],
    tokenizer_path: Path,
    output: Path,
    *,
    validation_inputs: Sequence[str] = (),
    validation_fraction: float = 0.0,
    shard_tokens: int = 100_000_000,
    end_token: str | None = None,
    named_format: Format | None = None,
) -> Manifest:
    """Copy the token ids of `inputs` into the folder `output`, and return its manifest.

    A document that an index describes gets the end token if it lacks it. Other files are copied as
    they are, and their end tokens end documents. A call after an interruption starts again; a call
    on complete data returns at once.

    The files of `validation_inputs` are the validation split, also where `inputs` hold them.
    Without, `validation_fraction` of the documents is held out.

    Raises:
        ValueError: a setting is invalid, `output` holds other files or the data of another job, a
            file is not as its format says, holds an id outside of the vocabulary or changes while
            it is read, or every document is held out.
        OSError: reading or writing fails. Call again to start again.
    """
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation fraction {validation_fraction} is not in [0, 1)")
    if validation_fraction and validation_inputs:
        raise ValueError(
            "the validation split comes from --validation-input: leave out --validation-fraction"
        )
    if shard_tokens < 1:
        raise ValueError(f"shard tokens {shard_tokens} is not a positive number")
    check_output(output)
    tokenizer = load_tokenizer(tokenizer_path)
    job = _Job(
        *_find_inputs(inputs, validation_inputs, named_format, vocabulary_size(tokenizer)),
        tokenizer=tokenizer,
        end_token_id=end_token_id(tokenizer, end_token),
        validation_fraction=validation_fraction,
        shard_tokens=shard_tokens,
    )
    console = Console(stderr=True)
    with writing_into(output):
        return _import_into(output, job, console)


def _find_inputs(
    inputs: Sequence[str],
    validation_inputs: Sequence[str],
    named_format: Format | None,
    vocab_size: int,
) -> tuple[dict[SplitName, list[TokenInput]], str]:
    """The token files of each split, and a clause about the files that are left out."""
    found, left_out = _find(inputs)
    held_out, _ = _find(validation_inputs)
    held_out_files = {path.resolve() for path in held_out}
    train = [path for path in found if path.resolve() not in held_out_files]
    # Opened together, so that their formats are compared.
    opened = open_token_inputs([*train, *held_out], named_format, vocab_size)
    splits: dict[SplitName, list[TokenInput]] = {
        "train": [file for file in opened if file.path.resolve() not in held_out_files],
        "validation": [file for file in opened if file.path.resolve() in held_out_files],
    }
    if not sum(file.tokens for file in splits["train"]):
        raise ValueError("the input files hold no tokens to train on: name more files with --input")
    return splits, left_out


def _find(inputs: Sequence[str]) -> tuple[list[Path], str]:
    for value in inputs:
        if is_url(value) and not value.startswith("file://"):
            raise ValueError(
                f"cannot import {shown(value)}: token files are read from a disk; download it, or "
                "mount its bucket"
            )
        tokens = Path(os.path.expanduser(f"{value.removeprefix('file://')}.bin"))
        if tokens.is_file() and not tokens.with_suffix("").exists():
            raise ValueError(
                f"input {shown(value)} does not exist: name {shown(str(tokens))}, whose index is "
                "found beside it"
            )
    found = find_files(inputs, TOKEN_FILES)
    return [Path(str(file)) for file in found.paths], found.describe_left_out()


def _import_into(output: Path, job: _Job, console: Console) -> Manifest:
    record = job.describe()
    claim_folder(output, record)
    if (complete := complete_manifest(output)) is not None:
        console.print(f"{output} is already complete")
        for line in notices(complete, job.validation_fraction):
            console.print(line)
        return complete
    for line in _notes(job):
        console.print(line)
    progress, writers = open_writers(output, record, job.tokenizer)
    started = time.monotonic()
    _copy(job, progress, writers, console)
    check_inputs(job.files("train"), record.inputs)
    check_inputs(job.files("validation"), record.validation_inputs or ())
    if not progress.splits["train"].tokens:
        if not progress.documents:
            raise ValueError(
                "the token files hold no end token, so all tokens are one document, which was held "
                "out for validation: name the token that ends a document with --end-token, or "
                f"leave out --validation-fraction {job.validation_fraction}"
            )
        raise ValueError(
            f"all documents ({progress.documents:,}) were held out for validation, and none is "
            f"left to train on: lower --validation-fraction {job.validation_fraction}"
        )
    manifest = complete_folder(output, record, job.tokenizer, progress, writers)
    splits = ", ".join(f"{split.tokens:,} {name}" for name, split in manifest.splits.items())
    seconds = time.monotonic() - started
    console.print(
        f"{output}: {progress.documents:,} documents, {splits} tokens, {seconds:.1f} s "
        f"({progress.tokens / seconds:,.0f} tokens/s)"
    )
    for line in notices(manifest, job.validation_fraction):
        console.print(line)
    return manifest


def _copy(
    job: _Job, progress: PrepareProgress, writers: dict[str, SplitWriter], console: Console
) -> None:
    """Append the tokens of all files to the shards."""
    reader = _Reader(vocabulary_size(job.tokenizer), job.end_token_id, writers["train"].dtype)
    text = TextBytes(job.tokenizer, job.end_token_id)
    started = time.monotonic()
    with token_bar(console) as bar:
        total = sum(file.tokens for files in job.inputs.values() for file in files)
        task = bar.add_task("", total=total, documents=0, tokens=0, rate=0.0)
        for split, files in job.inputs.items():
            divider = _Divider(split, job.end_token_id, job.validation_fraction)
            for ids, before in _whole_documents(reader.read(files), job.end_token_id):
                for name, part, context in divider.shares(ids, before):
                    written = writers[name].progress
                    written.documents += int(np.count_nonzero(part == job.end_token_id))
                    written.text_bytes += text.count(part, context)
                    writers[name].append(part)
                tokens, seconds = progress.tokens, time.monotonic() - started
                bar.update(
                    task,
                    completed=tokens,
                    documents=progress.documents,
                    tokens=tokens,
                    rate=tokens / seconds,
                )
    for line in reader.notes(job.tokenizer, progress):
        console.print(line)


class _Reader:
    """Reads token files, and ends each document that an index describes with the end token."""

    def __init__(self, vocab_size: int, end_token_id: int, dtype: np.dtype) -> None:
        self._vocab_size = vocab_size
        self._end_token_id = end_token_id
        self._dtype = dtype
        self._start = np.empty(0, dtype)
        self._described = self._lacking = self._inside = 0

    def read(self, files: Sequence[TokenInput]) -> Iterator[NDArray[np.integer]]:
        """Yield the token ids of `files` in chunks.

        Raises:
            ValueError, OSError: as `TokenInput.read`.
        """
        for file in files:
            for chunk, ends in file.read(self._vocab_size):
                ids = chunk.astype(self._dtype, copy=False)
                if ends is not None:
                    ids = self._ended(ids, ends)
                if not self._start.size:
                    self._start = ids
                yield ids

    def notes(self, tokenizer: Tokenizer, progress: PrepareProgress) -> Iterator[str]:
        """Yield a line about each way in which the end tokens differ from what is usual."""
        name = tokenizer.id_to_token(self._end_token_id)
        if self._lacking:
            yield (
                f"note: {self._lacking:,} of {self._described:,} documents lacked the end token "
                f"{name!r}, and got it"
            )
        if self._inside:
            yield (
                f"note: documents have the end token {name!r} inside, at {self._inside:,} places, "
                "and end there"
            )
        if not progress.documents:
            special = tokenizer.get_added_tokens_decoder()
            found = [
                repr(token.content)
                for number, token in sorted(special.items())
                if token.special and (self._start == number).any()
            ]
            remedy = (
                f"; the files have {', '.join(found)}: name it with --end-token" if found else ""
            )
            yield (
                f"warning: the end token {name!r} (id {self._end_token_id}) does not occur in "
                f"{progress.tokens:,} tokens, so nothing tells where documents end{remedy}"
            )

    def _ended(self, ids: NDArray[np.integer], ends: NDArray[np.int64]) -> NDArray[np.integer]:
        lacking = ends[ids[ends - 1] != self._end_token_id]
        self._described += ends.size
        self._lacking += lacking.size
        ids = np.insert(ids, lacking, self._end_token_id)
        self._inside += int(np.count_nonzero(ids == self._end_token_id)) - ends.size
        return ids


class _Divider:
    """Shares documents out between the splits by a hash of their tokens."""

    def __init__(self, split: str, end_token_id: int, validation_fraction: float) -> None:
        self._split = split
        self._end_token_id = end_token_id
        self._validation_fraction = validation_fraction

    def shares(
        self, ids: NDArray[np.integer], before: int | None
    ) -> Iterator[tuple[str, NDArray[np.integer], int | None]]:
        """Yield a split, its part of `ids`, and the token before if the part continues a document.

        `before` is the last token of the earlier call if `ids` continue its document.
        """
        if not self._validation_fraction:
            yield self._split, ids, before
            return
        stops = np.flatnonzero(ids == self._end_token_id) + 1
        if not stops.size or stops[-1] < ids.size:
            stops = np.append(stops, ids.size)
        starts = np.concatenate([[0], stops[:-1]])
        splits = [self._split_of(ids[a:b]) for a, b in zip(starts, stops, strict=True)]
        if before is not None:
            splits[0] = self._split
        self._split = splits[-1]
        is_held_out = np.repeat([name == "validation" for name in splits], stops - starts)
        for name in dict.fromkeys(splits):
            chosen = is_held_out if name == "validation" else ~is_held_out
            yield name, ids[chosen], before if name == splits[0] else None

    def _split_of(self, document: NDArray[np.integer]) -> str:
        start = document[:HASHED_TOKENS]
        text = start[start != self._end_token_id]
        return split_of(text.astype("<u4").tobytes(), self._validation_fraction)


def _whole_documents(
    chunks: Iterable[NDArray[np.integer]], end_token_id: int
) -> Iterator[tuple[NDArray[np.integer], int | None]]:
    """Cut the stream of `chunks` between documents, where they are shorter than a chunk.

    Yields token ids, and the token before them if they continue a document.
    """
    waiting: list[NDArray[np.integer]] = []
    before: int | None = None
    for chunk in chunks:
        ends = np.flatnonzero(chunk == end_token_id)
        # A long document goes on in parts, so that memory stays bounded.
        if not ends.size and sum(map(len, waiting)) + chunk.size < CHUNK_NUMBERS:
            waiting.append(chunk)
            continue
        cut = int(ends[-1]) + 1 if ends.size else chunk.size
        yield np.concatenate([*waiting, chunk[:cut]]), before
        before = None if ends.size else int(chunk[-1])
        waiting = [chunk[cut:]]
    if sum(map(len, waiting)):
        yield np.concatenate(waiting), before


def _notes(job: _Job) -> Iterator[str]:
    """Yield a line about the files to read, and about each that may not be what is meant."""
    files = [file for split in job.inputs.values() for file in split]
    tokens = sum(file.tokens for file in files)
    tokenizer = f", tokenizer {one_line(files[0].tokenizer, 80)}" if files[0].tokenizer else ""
    dtypes = " and ".join(sorted({file.dtype.name for file in files}))
    yield f"token files: {len(files):,} ({files[0].format}, {dtypes}{tokenizer}), {tokens:,} tokens"
    if job.left_out:
        yield f"left out: {job.left_out}"
    masked = [file.path for file in files if Path(f"{file.path}{LOSS}").exists()]
    if masked:
        yield (
            f"note: {_shown(masked[0])}{LOSS} and others like it are ignored: fastllama trains on "
            "every token"
        )
    for file in job.inputs["train"]:
        if _VALIDATION_NAME.search(file.path.name):
            yield (
                f"warning: {_shown(file.path)} is read for training: name it with "
                "--validation-input if it is the validation split"
            )
            return


def _shown(path: Path) -> str:
    return shortened(printable(path), 300)
