"""Mixtures: shares at every prefix, the period, rounded weights."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllama.data.mixture import MAX_PERIOD, Mixture

# Decimals have short periods, and other numbers the longest one.
decimals = st.integers(0, 60).map(lambda number: number / 20)
numbers = st.floats(1e-3, 1e3)
several = st.lists(decimals, min_size=1, max_size=8) | st.lists(numbers, min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(several.filter(any), st.integers(0, 10**15))
def test_every_prefix_is_within_one_sequence_of_the_weights(
    weights: list[float], start: int
) -> None:
    mixture = Mixture(weights)
    lengths = np.arange(2_000)
    shares = np.array(mixture.shares)
    counts = mixture.counts(lengths)
    assert (np.abs(counts - lengths[:, None] * shares) < 1).all()
    # A rounded weight is off by at most a turn and a half of the longest period.
    assert shares == pytest.approx(np.array(weights) / sum(weights), abs=1.5 / MAX_PERIOD)
    # Far from the beginning, where a sum of floats would be off by many.
    positions = start + lengths
    is_turn_of = mixture.sources(positions)[:, None] == np.arange(len(weights))
    assert (np.diff(mixture.counts(positions), axis=0) == is_turn_of[:-1]).all()


def test_decimals_are_exact() -> None:
    mixture = Mixture([0.7, 0.2, 0.1])
    assert mixture.counts(np.array(10**12)).tolist() == [7 * 10**11, 2 * 10**11, 10**11]
    assert mixture.sources(np.arange(10)).tolist() == mixture.sources(np.arange(50, 60)).tolist()


def test_weights_are_relative() -> None:
    positions = np.arange(100)
    sources = Mixture([3, 1]).sources(positions).tolist()
    assert Mixture([0.75, 0.25]).sources(positions).tolist() == sources
    assert Mixture([3e12, 1e12]).sources(positions).tolist() == sources


def test_source_without_weight_has_no_turn() -> None:
    assert set(Mixture([1, 0, 2]).sources(np.arange(99)).tolist()) == {0, 2}


def test_tiny_weight_keeps_a_turn_of_the_longest_period() -> None:
    mixture = Mixture([1.0, 1e-9])
    assert mixture.counts(np.array(MAX_PERIOD)).tolist() == [MAX_PERIOD - 1, 1]
