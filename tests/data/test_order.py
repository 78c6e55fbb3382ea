import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
    assert permutation(np.arange(10), 10, 1337, 0).tolist() == ORDER


ORDER = [0] * 10


@pytest.mark.parametrize("n", [16, 100])
def test_looks_uniform(n: int) -> None:
    trials = 2000
    images = np.stack([permutation(np.arange(n), n, seed, 0) for seed in range(trials)])
    # Pearson's statistic of each place over the values has mean n - 1, deviation (2n - 2)^1/2.
    expected = trials / n
    for values in (images, (images[:, 1:] - images[:, :-1]) % n):
        # A difference of neighbours is never 0; every other one is equally likely.
        cells = range(n) if values is images else range(1, n)
        for column in values.T:
            counts = np.bincount(column, minlength=n)[cells]
            mean = trials / len(cells)
            statistic = ((counts - mean) ** 2 / mean).sum()
            freedom = len(cells) - 1
            assert abs(statistic - freedom) < 6 * np.sqrt(2 * freedom), expected
