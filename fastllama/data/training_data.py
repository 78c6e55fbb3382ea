"""The sequences of a run in order, from one data folder or from a mixture of several.

A position is a place in the order, counted in blocks. A block has the length of the run's longest
sequence: without stages, a block is a sequence. `Mixture` gives the source of a position, and the
number of earlier positions of this source is the position in the source's own order, a permutation
of its blocks. A stage with shorter sequences cuts each block into several, which follow each other
in the order. Every token of a source is therefore read once in each of its epochs, wherever the
stages change the sequence length.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastllama.data.mixture import Mixture
from fastllama.data.order import sequence_indices
from fastllama.data.stream import TokenStream


@dataclass(frozen=True)
class Place:
    """Where a sequence is: the number of its source, and its number in the source's stream."""

    source: int
    sequence: int


class TrainingData:
    """The sequences of a run by their place in its order."""

    def __init__(
        self,
        streams: Sequence[TokenStream],
        *,
        block_len: int,
        seed: int,
        weights: Sequence[tuple[int, Sequence[float]]] = ((0, (1.0,)),),
    ) -> None:
        """Each of the `streams` has at least one block of `block_len` tokens.

        `weights` has the weight of each stream from a position on, the first from position 0.
        """
        self.streams = tuple(streams)
        self.block_len = block_len
        self._seed = seed
        self._n_blocks = [stream.n_sequences(block_len) for stream in streams]
        self._starts = np.array([start for start, _ in weights], np.int64)
        self._mixtures = [Mixture(of_streams) for _, of_streams in weights]
        before = np.zeros(len(streams), np.int64)
        self._counts_before = [before]
        for mixture, length in zip(self._mixtures, np.diff(self._starts), strict=False):
            before = before + mixture.counts(length)
            self._counts_before.append(before)

    def shares(self, position: int) -> list[float]:
        """Fraction of the positions around `position` that each stream gets."""
        return self._mixtures[self._phase(position)].shares

    def counts(self, position: int) -> NDArray[np.int64]:
        """Blocks of each stream (K,) before `position`."""
        phase = self._phase(position)
        length = np.int64(position) - self._starts[phase]
        return self._counts_before[phase] + self._mixtures[phase].counts(length)

    def epochs(self, position: int) -> list[float]:
        """How often each stream has been read before `position`."""
        counts = self.counts(position)
        return [float(count / n) for count, n in zip(counts, self._n_blocks, strict=True)]

    def places(self, numbers: range, seq_len: int) -> list[Place]:
        """The places of sequences by number, counted since the run began.

        All have `seq_len` tokens, a divisor of `block_len`, and are counted as if all before them
        had as many.
        """
        pieces = self.block_len // seq_len
        positions, piece = np.divmod(np.arange(numbers.start, numbers.stop, dtype=np.int64), pieces)
        sources, blocks = self._locate(positions)
        return [
            Place(source, sequence)
            for source, sequence in zip(
                sources.tolist(), (blocks * pieces + piece).tolist(), strict=True
            )
        ]

    def read(self, places: Sequence[Place], seq_len: int) -> Iterator[NDArray[np.integer]]:
        """Yield the tokens at each of the `places`, (seq_len + 1,).

        Raises:
            ValueError: a token id is outside of the vocabulary, or a shard was replaced.
            OSError: a shard can no longer be read.
        """
        for place in places:
            yield self.streams[place.source].read(place.sequence, seq_len)

    def fetch(self, places: Sequence[Place], seq_len: int) -> None:
        """Start to fetch the tokens at `places` that are behind URLs."""
        for place in places:
            self.streams[place.source].fetch(place.sequence, seq_len)

    def _locate(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source, and block of its stream, at each of the `positions`."""
        sources, blocks = np.empty_like(positions), np.empty_like(positions)
        phases = np.searchsorted(self._starts, positions, side="right") - 1
        for phase in np.unique(phases):
            chosen = np.flatnonzero(phases == phase)
            within = positions[chosen] - self._starts[phase]
            mixture = self._mixtures[phase]
            sources[chosen] = mixture.sources(within)
            # In the order of each source, the block is at the number of turns it had before.
            before = self._counts_before[phase] + mixture.counts(within)
            blocks[chosen] = before[np.arange(len(chosen)), sources[chosen]]
        for source in np.unique(sources):
            chosen = np.flatnonzero(sources == source)
            n_blocks = self._n_blocks[source]
            blocks[chosen] = sequence_indices(blocks[chosen], n_blocks, self._seed)
        return sources, blocks

    def _phase(self, position: int) -> int:
        return int(np.searchsorted(self._starts, position, side="right")) - 1
