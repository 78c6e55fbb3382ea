import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fastllama.data.order import permutation, sequence_indices

sizes = st.integers(1, 5000)
seeds = st.integers(0, 2**32)


@settings(deadline=None)
@given(n=sizes, seed=seeds, epoch=st.integers(0, 1000))
def test_every_sequence_comes_once(n: int, seed: int, epoch: int) -> None:
    assert sorted(permutation(np.arange(n), n, seed, epoch)) == list(range(n))


@settings(deadline=None)
@given(n=sizes, seed=seeds, data=st.data())
def test_a_value_does_not_depend_on_what_else_is_asked(
    n: int, seed: int, data: st.DataObject
) -> None:
    whole = sequence_indices(np.arange(3 * n), n, seed)
    begin = data.draw(st.integers(0, 3 * n - 1))
    end = data.draw(st.integers(begin, min(3 * n, begin + 50)))
    assert np.array_equal(sequence_indices(np.arange(begin, end), n, seed), whole[begin:end])
    assert sequence_indices(np.array([[begin]]), n, seed) == [[whole[begin]]]


def test_a_value_costs_the_same_anywhere() -> None:
    # Ten trillion sequences: nothing of that size can be stored or stepped through.
    n = 10**13
    (index,) = sequence_indices(np.array([7 * n + 123]), n, seed=0)
    assert index == permutation(np.array([123]), n, seed=0, epoch=7)[0]
    assert 0 <= index < n


def test_epochs_follow_each_other() -> None:
    n, seed = 10, 3
    wanted = [permutation(np.arange(n), n, seed, epoch) for epoch in range(3)]
    assert np.array_equal(sequence_indices(np.arange(3 * n), n, seed), np.concatenate(wanted))


def test_order_changes_with_epoch_and_seed() -> None:
    positions = np.arange(100)
    orders = {tuple(permutation(positions, 100, *key)) for key in ((0, 0), (0, 1), (1, 0), (1, 1))}
    # (0, 1) and (1, 0) too: seed and epoch are not merely added.
    assert len(orders) == 4


def test_order_is_the_same_in_every_version() -> None:
    # A run that is resumed by another version has to go on with the data it has not seen.
    order = permutation(np.arange(10), 10, seed=1337, epoch=0)
    assert order.tolist() == [6, 5, 7, 0, 3, 1, 2, 9, 4, 8]


@pytest.mark.parametrize("n", [16, 100])
def test_looks_uniform(n: int) -> None:
    images = np.stack([permutation(np.arange(n), n, seed, 0) for seed in range(2000)])
    # Six deviations: 300 columns of an honest shuffle stay below.
    for column in images.T:
        assert surprise(column, range(n)) < 6
    # Neighbours must not go together either; their difference is anything but 0.
    for column in (images[:, 1:] - images[:, :-1]).T % n:
        assert surprise(column, range(1, n)) < 6


def surprise(values: NDArray[np.int64], among: range) -> float:
    """Pearson's statistic for even odds, in standard deviations above its mean."""
    counts = np.bincount(values - among.start, minlength=len(among))
    freedom = len(counts) - 1
    statistic = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    return (statistic - freedom) / (2 * freedom) ** 0.5
