"""What a refused update was trained on, for whoever wants to see what is wrong with it."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastllama.config import Config
from fastllama.data.dataset import Dataset
from fastllama.data.order import sequence_indices

SHOWN = 4
"""Sequences of the batch whose text is given."""


@dataclass(frozen=True)
class RefusedSeries:
    """Updates that were refused one after the other."""

    first_step: int
    last_step: int
    next_position: int
    """In the data order, after the last of them."""


def batch_of(end: int, config: Config, dataset: Dataset) -> dict[str, Any]:
    """The batch of the update that ended at position `end` of the data order.

    Its positions, its sequences, and the text of the first few.

    Raises:
        OSError: the shards can no longer be read.
    """
    seq_len = config.model.max_seq_len
    first, last = batch_positions(end, config)
    n_sequences = dataset.train.n_sequences(seq_len)
    positions = np.arange(first, last + 1, dtype=np.int64)
    sequences = sequence_indices(positions, n_sequences, config.training.seed).tolist()
    texts = [
        dataset.tokenizer.decode(
            dataset.train.read(index, seq_len).tolist(), skip_special_tokens=False
        )
        for index in sequences[:SHOWN]
    ]
    return {"positions": [first, last], "sequences": sequences, "texts": texts}


def batch_positions(end: int, config: Config) -> tuple[int, int]:
    """First and last position in the data order of the update that ended before `end`."""
    return end - config.sequences_per_update, end - 1
