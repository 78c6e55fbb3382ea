"""The order of a run: every token once in an epoch, whatever stages, ranks and interruptions."""

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllama.data.order import sequence_indices
from fastllama.data.training_data import TrainingData

BLOCK = 8


@dataclass
class Stream:
    """A stream of whole blocks."""

    n_blocks: int

    def n_sequences(self, seq_len: int) -> int:
        return self.n_blocks * BLOCK // seq_len


def make_data(n_blocks: list[int], weights: list[tuple[int, list[float]]]) -> TrainingData:
    streams = cast(Any, [Stream(n) for n in n_blocks])
    return TrainingData(streams, block_len=BLOCK, seed=3, weights=weights)


def test_one_source_has_the_order_of_its_permutation() -> None:
    data = make_data([10], [(0, [1.0])])
    # Over the ends of two epochs.
    places = data.places(range(7, 26), BLOCK)
    assert [place.source for place in places] == [0] * 19
    expected = sequence_indices(np.arange(7, 26), 10, seed=3).tolist()
    assert [place.sequence for place in places] == expected
    assert data.places(range(0), BLOCK) == []


@st.composite
def runs(draw: st.DrawFn) -> tuple[TrainingData, list[tuple[int, int, int, int]]]:
    """Data, and sessions of a run: position, updates, sequence length, blocks of an update.

    A session ends where a stage ends, or where the run is interrupted.
    """
    n_sources = draw(st.integers(1, 3))
    n_blocks = draw(st.lists(st.integers(1, 40), min_size=n_sources, max_size=n_sources))
    per_update = draw(st.integers(1, 6))
    weights, sessions, position = [], [], 0
    for _ in range(draw(st.integers(1, 4))):
        of_sources = draw(
            st.lists(st.integers(0, 4), min_size=n_sources, max_size=n_sources).filter(any)
        )
        weights.append((position, cast(list[float], of_sources)))
        for _ in range(draw(st.integers(1, 2))):
            n_updates = draw(st.integers(1, 12))
            sessions.append((position, n_updates, draw(st.sampled_from([2, 4, 8])), per_update))
            position += n_updates * per_update
    return make_data(n_blocks, weights), sessions


@settings(max_examples=60, deadline=None)
@given(runs())
def test_every_token_once_in_each_epoch(
    run: tuple[TrainingData, list[tuple[int, int, int, int]]],
) -> None:
    data, sessions = run
    seen: list[Counter[int]] = [Counter() for _ in data.streams]
    for position, n_updates, seq_len, per_update in sessions:
        pieces = BLOCK // seq_len
        numbers = range(position * pieces, (position + n_updates * per_update) * pieces)
        for place in data.places(numbers, seq_len):
            first = place.sequence * seq_len
            seen[place.source].update(range(first, first + seq_len))
    end = sessions[-1][0] + sessions[-1][1] * sessions[-1][3]
    counts = data.counts(end).tolist()
    assert sum(counts) == end
    for stream, tokens, n_read in zip(cast(list[Stream], data.streams), seen, counts, strict=True):
        assert tokens.total() == n_read * BLOCK
        whole_epochs, rest = divmod(n_read, stream.n_blocks)
        times = Counter(tokens[token] for token in range(stream.n_blocks * BLOCK))
        assert times[whole_epochs + 1] == rest * BLOCK
        assert times[whole_epochs] == (stream.n_blocks - rest) * BLOCK


@settings(max_examples=60, deadline=None)
@given(runs(), st.data())
def test_places_do_not_depend_on_where_reading_starts(
    run: tuple[TrainingData, list[tuple[int, int, int, int]]], draw: st.DataObject
) -> None:
    data, sessions = run
    pieces = 2
    end = (sessions[-1][0] + sessions[-1][1] * sessions[-1][3]) * pieces
    whole = data.places(range(end), BLOCK // pieces)
    cuts = sorted({0, end, *draw.draw(st.lists(st.integers(0, end), max_size=4))})
    parts = [data.places(range(a, b), BLOCK // pieces) for a, b in pairwise(cuts)]
    assert [place for part in parts for place in part] == whole


@settings(max_examples=60, deadline=None)
@given(runs())
def test_stages_are_within_one_block_of_their_weights(
    run: tuple[TrainingData, list[tuple[int, int, int, int]]],
) -> None:
    data, sessions = run
    for position, n_updates, _, per_update in sessions:
        n = n_updates * per_update
        used = data.counts(position + n) - data.counts(position)
        shares = np.array(data.shares(position))
        # Within one block at both ends of the session.
        assert (np.abs(used - n * shares) < 2).all()


def test_epochs_count_what_was_read() -> None:
    data = make_data([10, 20], [(0, [1.0, 1.0]), (20, [0.0, 1.0])])
    assert data.epochs(20) == [1.0, 0.5]
    assert data.epochs(30) == [1.0, 1.0]
