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
def test_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    assert sorted(permutation(np.arange(n), n, seed, epoch)) == list(range(n))


@settings(deadline=None)
@given(n=sizes, seed=seeds, data=st.data())
def test_value_is_independent_of_other_positions(n: int, seed: int, data: st.DataObject) -> None:
    whole = sequence_indices(np.arange(3 * n), n, seed)
    begin = data.draw(st.integers(0, 3 * n - 1))
    end = data.draw(st.integers(begin, min(3 * n, begin + 50)))
    assert np.array_equal(sequence_indices(np.arange(begin, end), n, seed), whole[begin:end])
    assert sequence_indices(np.array([[begin]]), n, seed) == [[whole[begin]]]


def test_ten_trillion_sequences() -> None:
    # Too many to store or to iterate over.
    n = 10**13
    (index,) = sequence_indices(np.array([7 * n + 123]), n, seed=0)
    assert index == permutation(np.array([123]), n, seed=0, epoch=7)[0]
    assert 0 <= index < n


def test_epochs_are_consecutive() -> None:
    n, seed = 10, 3
    wanted = [permutation(np.arange(n), n, seed, epoch) for epoch in range(3)]
    assert np.array_equal(sequence_indices(np.arange(3 * n), n, seed), np.concatenate(wanted))


def test_order_changes_with_epoch_and_seed() -> None:
    positions = np.arange(100)
    orders = {tuple(permutation(positions, 100, *key)) for key in ((0, 0), (0, 1), (1, 0), (1, 1))}
    # (0, 1) and (1, 0) also differ: the key is not the sum of seed and epoch.
    assert len(orders) == 4


def test_order_is_stable_across_versions() -> None:
    # A newer version must resume an old run on the data that the run has not seen.
    order = permutation(np.arange(10), 10, seed=1337, epoch=0)
    assert order.tolist() == [6, 5, 7, 0, 3, 1, 2, 9, 4, 8]


@pytest.mark.parametrize("n", [16, 100])
def test_images_are_uniform(n: int) -> None:
    images = np.stack([permutation(np.arange(n), n, seed, 0) for seed in range(2000)])
    # Six standard deviations: 300 columns of a uniform shuffle stay below.
    for column in images.T:
        assert uniformity_score(column, range(n)) < 6
    # Neighbours must be independent too. Their difference is never 0.
    for column in (images[:, 1:] - images[:, :-1]).T % n:
        assert uniformity_score(column, range(1, n)) < 6


def uniformity_score(values: NDArray[np.int64], among: range) -> float:
    """Chi-squared statistic against a uniform distribution, in deviations above its mean."""
    counts = np.bincount(values - among.start, minlength=len(among))
    freedom = len(counts) - 1
    statistic = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    return (statistic - freedom) / (2 * freedom) ** 0.5
