"""Encodes documents into a data folder of token shards, and resumes after an interruption.

A resumed run first cuts the shards to the recorded progress, so interruptions never change a byte
of the result. `prepare_state.py` reads and writes the record.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from fastllama.console import Console, token_bar
from fastllama.data.accounting import Accounting
from fastllama.data.documents import Document, Empty, Malformed, read_documents
from fastllama.data.encoding import EncodedTexts, Encoder
from fastllama.data.files import InputFiles, find_files
from fastllama.data.manifest import Manifest
from fastllama.data.notices import all_held_out, cut_words, lost_text, notices
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
from fastllama.data.parts import Part, files_of_part
from fastllama.data.prepare_state import (
    InputRecord,
    JobRecord,
    PrepareProgress,
    claim_folder,
    digest_of,
    discard_work,
    recorded_commits,
    reject_other_parts,
)
from fastllama.data.records import MAX_DOCUMENT_MB
from fastllama.data.shards import SplitWriter
from fastllama.data.tokenizer import end_token_id, fingerprint, load_tokenizer
from fastllama.printable import printable

BATCH_CHARACTERS = 4_000_000
BATCH_RECORDS = 4096
ENCODED_AT_ONCE = 2
"""Batches. The tokenizer takes all cores, but Python copies its result on one: the other cores have
the next batch meanwhile."""
COMMIT_SECONDS = 5.0
MAX_WORKERS = 1024
"""Starting a thread takes milliseconds, and more threads than cores gain nothing."""

T = TypeVar("T")
R = TypeVar("R")
Record = Document | Empty | Malformed


@dataclass(frozen=True)
class Job:
    """The inputs and settings of one preparation. They determine every byte of the result."""

    files: InputFiles
    inputs: tuple[InputRecord, ...]
    part: Part | None
    all_inputs: str | None
    field: str
    max_document_mb: int
    tokenizer: Tokenizer
    end_token_id: int
    validation_fraction: float
    shard_tokens: int

    def describe(self) -> JobRecord:
        """The job as `job.json` records it."""
        return JobRecord(
            inputs=self.inputs,
            field=printable(self.field),
            tokenizer=fingerprint(self.tokenizer),
            end_token_id=self.end_token_id,
            validation_fraction=self.validation_fraction,
            shard_tokens=self.shard_tokens,
            max_document_mb=self.max_document_mb,
            part=self.part,
            all_inputs=self.all_inputs,
            commits=self.files.commits or None,
        )

    def check_inputs(self, first: int, last: int) -> None:
        """Check that input files number `first` to `last` are still as they were at the start.

        Raises:
            ValueError: a file is gone or was changed.
            OSError: the network fails.
        """
        check_inputs(self.files.paths[first : last + 1], self.inputs[first : last + 1])


def prepare(
    inputs: Sequence[str],
    tokenizer_path: Path,
    output: Path,
    *,
    field: str = "text",
    max_document_mb: int = MAX_DOCUMENT_MB,
    validation_fraction: float = 0.0,
    shard_tokens: int = 100_000_000,
    end_token: str | None = None,
    strict: bool = False,
    workers: int | None = None,
    part: Part | None = None,
) -> Manifest:
    """Encode the documents of `inputs` into the folder `output`, and return its manifest.

    The end token follows each document. A call after an interruption resumes; a call on complete
    data returns at once. Malformed records are counted and skipped, unless `strict`. A record or
    text file of more than `max_document_mb` MB is malformed.

    With `part`, encode only the files of this part, into a folder of its own below `output`, and
    return the manifest of the part, which may be empty. The inputs must have the same paths on all
    machines. `join` joins the parts.

    `workers` is the number of encoding threads (default: one per core). The tokenizers library
    reads it once, so it has no effect in a process that has already encoded a batch.

    Raises:
        ValueError: a setting is invalid, `output` holds other files, other parts or the data of
            another job, the input has no document or changes while it is read, every document is
            held out, the tokenizer cannot encode a document, or `strict` and a record is malformed
            or text is lost.
        OSError: reading or writing fails. Call again to resume.
    """
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation fraction {validation_fraction} is not in [0, 1)")
    for name, value in (("shard tokens", shard_tokens), ("workers", workers)):
        if value is not None and value < 1:
            raise ValueError(f"{name} {value} is not a positive number")
    if workers is not None and workers > MAX_WORKERS:
        raise ValueError(f"workers {workers} is more than {MAX_WORKERS}: leave --workers out")
    check_output(output)
    if workers is not None:
        os.environ["RAYON_NUM_THREADS"] = str(workers)
    tokenizer = load_tokenizer(tokenizer_path)
    files = find_files(inputs, commits=recorded_commits(output))
    records = tuple(map(describe_input, files.paths))
    own = slice(None) if part is None else files_of_part([size for _, size, _ in records], part)
    job = Job(
        files=replace(files, paths=files.paths[own]),
        inputs=records[own],
        part=part,
        all_inputs=None if part is None else digest_of(records),
        field=field,
        max_document_mb=max_document_mb,
        tokenizer=tokenizer,
        end_token_id=end_token_id(tokenizer, end_token),
        validation_fraction=validation_fraction,
        shard_tokens=shard_tokens,
    )
    console = Console(stderr=True)
    if part is not None:
        # It is never deleted again: other machines may be adding their parts.
        output.mkdir(parents=True, exist_ok=True)
        reject_other_parts(output, part, job.describe())
        output /= part.folder
    with writing_into(output):
        return _prepare_folder(output, job, strict, console)


def _prepare_folder(output: Path, job: Job, strict: bool, console: Console) -> Manifest:
    record = job.describe()
    claim_folder(output, record)
    if (complete := complete_manifest(output)) is not None:
        console.print(f"{output} is already complete")
        for line in notices(complete, job.validation_fraction, of_part=job.part is not None):
            console.print(line)
        return complete
    progress, writers = open_writers(output, record, job.tokenizer)
    started = time.monotonic()
    _encode(output, job, progress, writers, strict, console)
    job.check_inputs(0, len(job.inputs) - 1)
    if not progress.splits["train"].tokens and job.part is None:
        discard_work(output, progress)
        raise ValueError(all_held_out(progress.documents, job.validation_fraction))
    manifest = complete_folder(output, record, job.tokenizer, progress, writers)
    splits = ", ".join(f"{split.tokens:,} {name}" for name, split in manifest.splits.items())
    console.print(
        f"{output}: {progress.documents:,} documents, {splits or 0} tokens, "
        f"{progress.read.malformed:,} malformed records skipped, {time.monotonic() - started:.1f} s"
    )
    for line in notices(manifest, job.validation_fraction, of_part=job.part is not None):
        console.print(line)
    return manifest


def _encode(
    output: Path,
    job: Job,
    progress: PrepareProgress,
    writers: dict[str, SplitWriter],
    strict: bool,
    console: Console,
) -> None:
    """Append all remaining documents. Record progress every `COMMIT_SECONDS` and at the end."""
    sizes = [size for _, size, _ in job.inputs]
    encoder = Encoder(job.tokenizer, job.end_token_id)
    started = committed = time.monotonic()
    tokens_before = progress.tokens
    accounting = Accounting(console.print, progress.read)
    records = read_documents(
        job.files.paths,
        job.field,
        progress.position,
        job.max_document_mb,
        may_be_empty=job.part is not None,
    )
    with (
        _mapped(
            partial(_encode_batch, job, encoder, strict), _record_batches(records)
        ) as encoded_batches,
        token_bar(console) as bar,
    ):
        task = bar.add_task(
            "",
            total=sum(sizes),
            completed=sum(sizes[: progress.position.file]),
            documents=progress.documents,
            tokens=tokens_before,
            rate=0.0,
        )
        for batch, encoded in encoded_batches:
            progress.text_loss.merge(encoded.loss)
            if strict and progress.text_loss.lost:
                raise ValueError(f"{lost_text(progress.text_loss)}; or leave out --strict")
            documents = list(accounting.documents(batch))
            _append(documents, encoded.ids, job.validation_fraction, writers)
            progress.forced_cuts += encoded.forced_cuts
            progress.position = batch[-1].next
            now = time.monotonic()
            # Before the first document there is nothing to lose. `read_documents` reports an input
            # without documents only if it starts at the beginning.
            if now - committed >= COMMIT_SECONDS and progress.documents:
                _commit(output, progress, writers)
                committed = now
            bar.update(
                task,
                completed=batch[-1].bytes_read,
                documents=progress.documents,
                tokens=progress.tokens,
                rate=(progress.tokens - tokens_before) / (now - started),
            )
    _commit(output, progress, writers)
    for line in accounting.summary(job.files):
        console.print(line)
    if progress.forced_cuts:
        console.print(cut_words(progress.forced_cuts))


def _commit(output: Path, progress: PrepareProgress, writers: dict[str, SplitWriter]) -> None:
    for writer in writers.values():
        writer.sync()
    progress.save(output)


def _record_batches(
    records: Iterator[Record],
) -> Iterator[list[Record]]:
    batch: list[Record] = []
    characters = 0
    for record in records:
        batch.append(record)
        characters += len(record.text) if isinstance(record, Document) else 0
        if characters >= BATCH_CHARACTERS or len(batch) == BATCH_RECORDS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


@contextmanager
def _mapped(function: Callable[[T], R], items: Iterator[T]) -> Iterator[Iterator[R]]:
    """Give `function` of each item, in order. Threads read and compute the next ones meanwhile.

    They are waited for on exit. A generator that waited when it is closed would do so wherever
    garbage is collected, for example while Python starts a thread: then both would wait for ever.
    """
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(ENCODED_AT_ONCE) as threads:

        def apply(read: Future[T | None]) -> R | None:
            return None if (item := read.result()) is None else function(item)

        def results() -> Iterator[R]:
            upcoming = deque(
                threads.submit(apply, reader.submit(next, items, None))
                for _ in range(ENCODED_AT_ONCE + 1)
            )
            while (result := upcoming.popleft().result()) is not None:
                upcoming.append(threads.submit(apply, reader.submit(next, items, None)))
                yield result

        try:
            yield results()
        finally:
            threads.shutdown(cancel_futures=True)


def _encode_batch(
    job: Job, encoder: Encoder, strict: bool, batch: list[Record]
) -> tuple[list[Record], EncodedTexts]:
    """A batch, and its documents encoded.

    Raises:
        ValueError: an input file changed, the tokenizer cannot encode a document, or `strict` and a
            record is malformed.
    """
    # Before progress is recorded: what is read from a truncated file lacks documents.
    job.check_inputs(batch[0].file, batch[-1].file)
    if strict:
        _reject_malformed(batch)
    return batch, encoder.encode([item.text for item in batch if isinstance(item, Document)])


def _reject_malformed(batch: list[Record]) -> None:
    for record in batch:
        if isinstance(record, Malformed):
            raise ValueError(
                f"{record.where}: {record.reason}; fix the input or leave out --strict"
            )


def _append(
    documents: list[Document],
    encoded: list[NDArray[np.uint32]],
    validation_fraction: float,
    writers: dict[str, SplitWriter],
) -> None:
    ids: dict[str, list[NDArray[np.uint32]]] = {name: [] for name in writers}
    for document, document_ids in zip(documents, encoded, strict=True):
        data = document.text.encode()
        name = split_of(data, validation_fraction)
        ids[name].append(document_ids)
        writers[name].progress.documents += 1
        writers[name].progress.text_bytes += len(data)
    for name, writer in writers.items():
        if ids[name]:
            writer.append(np.concatenate(ids[name], dtype=writer.dtype, casting="same_kind"))
