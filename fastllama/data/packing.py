"""Where documents begin in the sequences of a micro-batch, for training that keeps them apart.

A document of a sequence begins with the end token before it, which is then the first input of the
document, or with the sequence itself, which may cut a document. So every token has a target.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastllama.config import Config
from fastllama.data.batch import IGNORED
from fastllama.data.dataset import Dataset

_GROWTH = 4


@dataclass(frozen=True)
class Packing:
    """How the documents of micro-batches are kept apart."""

    end_token_id: int
    n_documents: int
    """Documents that the usual `cu_seqlens` of a micro-batch has room for."""

    @classmethod
    def of(cls, config: Config, dataset: Dataset) -> "Packing | None":
        """The packing of a run in the stage `config`; None without `data.document_mask`."""
        if not config.data.document_mask:
            return None
        splits = [source.manifest.splits["train"] for source in dataset.sources]
        shortest = min(split.tokens / max(1, split.documents) for split in splits)
        batch_size, seq_len = config.training.batch_size, config.model.max_seq_len
        room = document_room(batch_size, seq_len, shortest)
        return cls(dataset.end_token_id, room)

    def cu_seqlens(self, batch: NDArray[np.int64]) -> NDArray[np.int32]:
        """Where documents begin among the B * T inputs of `batch`, (n_documents + 1,).

        `batch` is (2, B, T), as `fill_batch` fills it. B * T is repeated to reach the length, as
        documents of length 0. More documents than `n_documents` get a length of four, sixteen, …
        times as many, so that few lengths occur: torch.compile makes graphs for each.
        """
        inputs, targets = batch
        # A row without a sequence may be full of end tokens.
        begins = (inputs == self.end_token_id) & (targets != IGNORED)
        begins[:, 0] = True
        starts = np.flatnonzero(begins)
        room = self.n_documents
        while room < len(starts):
            room *= _GROWTH
        cu_seqlens = np.full(min(room, inputs.size) + 1, inputs.size, np.int32)
        cu_seqlens[: len(starts)] = starts
        return cu_seqlens


def document_room(batch_size: int, seq_len: int, tokens_per_document: float) -> int:
    """Documents for which `cu_seqlens` has room: rarely fewer than a micro-batch has.

    Four times as many as documents of mean length, 16 more, and one for each sequence, rounded up
    to a power of two. Of 100,000 micro-batches with log-normal lengths, whose standard deviation is
    7 times their mean, none had more. Room costs time and memory: for each document of length 0
    FlashAttention 2 launches at least T / 128 empty programs a head, and its backward pads the
    gradient of q by 128 tokens in float32.
    """
    n_tokens = batch_size * seq_len
    room = batch_size + 16 + 4 * n_tokens / tokens_per_document
    return min(2 ** math.ceil(math.log2(room)), n_tokens)
