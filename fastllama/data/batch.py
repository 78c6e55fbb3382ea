"""Reads sequences of a token stream into batches of inputs and targets."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from fastllama.data.order import sequence_indices
from fastllama.data.stream import TokenStream

IGNORED = -100
"""Target that the loss ignores, the default `ignore_index` of the operators."""


def read_batch(stream: TokenStream, sequences: Sequence[int], out: Tensor) -> None:
    """Fill `out`, (2, B, T) int64 on the host, with inputs and with targets shifted by one.

    Row i holds sequence number `sequences[i]` of the stream. Rows without a sequence get token id
    0 as inputs and `IGNORED` as targets.

    Raises:
        OSError: a shard can no longer be read.
    """
    inputs, targets = out.numpy()
    for row, sequence in enumerate(sequences):
        tokens = stream.read(sequence, inputs.shape[1])
        inputs[row], targets[row] = tokens[:-1], tokens[1:]
    inputs[len(sequences) :], targets[len(sequences) :] = 0, IGNORED


def sequences_at(positions: range, stream: TokenStream, seq_len: int, seed: int) -> list[int]:
    """Sequence numbers at `positions` of the data order, counted since the run began."""
    n_sequences = stream.n_sequences(seq_len)
    return sequence_indices(np.array(positions, np.int64), n_sequences, seed).tolist()
