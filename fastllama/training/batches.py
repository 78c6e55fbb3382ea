"""The batch of an update, found again in the data: its sequences, their sources and texts."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fastllama.checkpoints.folder import complete_checkpoints
from fastllama.checkpoints.reading import read_progress
from fastllama.checkpoints.state import TrainProgress
from fastllama.config import Config
from fastllama.data.dataset import Dataset
from fastllama.run_folder import RunFolder
from fastllama.typed_json import DamagedFileError

SHOWN = 4
"""Sequences of a batch whose text bad-updates.jsonl shows."""


def batch_record(step: int, end_position: int, config: Config, dataset: Dataset) -> dict[str, Any]:
    """Positions, sequence numbers and first texts of the batch of update `step`.

    Of a mixture also the name of each sequence's source. The batch ended at `end_position`.

    Raises:
        OSError: the shards can no longer be read.
    """
    seq_len = config.at(step).model.max_seq_len
    first, last = batch_positions(end_position, config)
    pieces = config.longest_seq_len // seq_len
    places = dataset.train.places(range(first * pieces, (last + 1) * pieces), seq_len)
    texts = [
        dataset.tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
        for tokens in dataset.train.read(places[:SHOWN], seq_len)
    ]
    record = {
        "positions": [first, last],
        "sequences": [place.sequence for place in places],
        "texts": texts,
    }
    if len(dataset.sources) > 1:
        record["sources"] = [dataset.sources[place.source].name for place in places]
    return record


def batch_positions(end_position: int, config: Config) -> tuple[int, int]:
    """First and last position in the data order of the update that ended at `end_position`."""
    return end_position - config.positions_per_update, end_position - 1


def end_position(run: RunFolder, config: Config, step: int) -> int:
    """Position in the data order after update `step`.

    It follows from the checkpoints before and after the update. A rewind moves the positions of all
    updates after the checkpoint that it loads.

    Raises:
        ValueError: the run has not done the update, has no checkpoint, or rewound between the two.
    """
    progress = []
    for checkpoint in complete_checkpoints(run.checkpoints):
        try:
            progress.append(read_progress(checkpoint))
        except (DamagedFileError, OSError):
            continue
    if not progress:
        raise ValueError(
            f"{run.path} has no whole checkpoint, which would tell what its updates read; name "
            "the place by --position."
        )
    last = max(saved.step for saved in progress)
    if not last:
        raise ValueError(
            f"{run.path} has not trained yet, so it has no updates; name the place by --position."
        )
    if not 1 <= step <= last:
        raise ValueError(
            f"{run.path} has checkpoints up to update {last}, and none of update {step}; give a "
            f"--step from 1 to {last}."
        )
    saved = sorted([TrainProgress(), *progress], key=lambda each: each.step)
    before = [each for each in saved if each.step < step][-1]
    after = next(each for each in saved if each.step >= step)
    shifts = [each.position - each.step * config.positions_per_update for each in (before, after)]
    interval, per_update = config.checkpoint.interval_tokens, config.training.tokens_per_update
    removed = interval > 0 and (
        (after.step - 1) * per_update // interval > before.step * per_update // interval
    )
    # A rewind moved what follows the checkpoint that it loaded: `before`, or one removed since.
    if shifts[0] != shifts[1] and (removed or not before.step):
        raise ValueError(
            f"{run.path} rewound between the updates {before.step} and {after.step}, and no "
            f"checkpoint between them tells what update {step} read; give a --position."
        )
    return step * config.positions_per_update + shifts[1]


@dataclass(frozen=True)
class Seen:
    """A sequence of an update."""

    position: int
    """Position in the data order; sequences of a stage with shorter ones share it."""
    micro_batch: int
    rank: int
    source: str
    """Name of the source; empty with one source."""
    sequence: int
    """Number in the stream of the source."""
    first_token: int
    """Number of its first token in the stream of the source."""
    documents: list[str]
    """Text of the documents and parts of documents in it, in order."""


def sequences_seen(
    config: Config, dataset: Dataset, step: int, end: int, world_size: int
) -> Iterator[Seen]:
    """Yield the sequences of update `step`, which `world_size` ranks read up to position `end`.

    Raises:
        OSError: the shards can no longer be read.
    """
    stage = config.at(step)
    seq_len, batch_size = stage.model.max_seq_len, stage.training.batch_size
    pieces = config.longest_seq_len // seq_len
    first, last = batch_positions(end, config)
    places = dataset.train.places(range(first * pieces, (last + 1) * pieces), seq_len)
    for number, place in enumerate(places):
        [tokens] = dataset.train.read([place], seq_len)
        micro_batch, row = divmod(number, batch_size * world_size)
        yield Seen(
            position=first + number // pieces,
            micro_batch=micro_batch,
            rank=row // batch_size,
            source=dataset.sources[place.source].name,
            sequence=place.sequence,
            first_token=place.sequence * seq_len,
            documents=_documents(tokens[:-1].tolist(), dataset),
        )


def _documents(tokens: list[int], dataset: Dataset) -> list[str]:
    """The texts between the end tokens. An end token at the end is followed by no document."""
    documents: list[list[int]] = [[]]
    for token in tokens:
        if token == dataset.end_token_id:
            documents.append([])
        else:
            documents[-1].append(token)
    return [dataset.tokenizer.decode(ids, skip_special_tokens=False) for ids in documents]
