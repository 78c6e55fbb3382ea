"""Micro-batches: token sequences as inputs and targets."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

IGNORED = -100
"""Target that the loss ignores, the default `ignore_index` of the operators."""


class Batch(NamedTuple):
    """A micro-batch on the device."""

    inputs: Tensor
    """Token ids (B, T) int64."""
    targets: Tensor
    """The next token of each input (B, T) int64."""
    sources: Tensor | None
    """The number of each sequence's source (B,) int64; None with one source."""
    cu_seqlens: Tensor | None
    """(n_documents + 1,) int32, as in `Packing.cu_seqlens`; None if documents may mix."""


def fill_batch(sequences: Iterable[NDArray[np.integer]], out: Tensor) -> None:
    """Fill `out`, (2, B, T) int64 on the host, with inputs and with targets shifted by one.

    Row i holds the i-th of the `sequences`, each (T + 1,). Rows without a sequence get token id 0
    as inputs and `IGNORED` as targets.
    """
    inputs, targets = out.numpy()
    n_filled = 0
    for n_filled, tokens in enumerate(sequences, 1):
        inputs[n_filled - 1], targets[n_filled - 1] = tokens[:-1], tokens[1:]
    inputs[n_filled:], targets[n_filled:] = 0, IGNORED
