"""Mixtures: which source each position of the data order reads, computed instead of stored.

The schedule repeats after a period in which every source has its whole number of turns. Turn j of a
source with the share p may come from position floor(j/p) on, and has to come before ceil((j+1)/p).
The turn that is due first comes first. These are the windows of the proportionate-fair schedules of
Baruah et al. 1996, "Proportionate progress: a notion of fairness in resource allocation". Taking
the earliest deadline meets all of them, so after every prefix of n positions each source has had
less than one turn more or less than n p.
"""

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

MAX_PERIOD = 2**16
"""Longest period. Weights that need a longer one are rounded to multiples of 1 / MAX_PERIOD."""


class Mixture:
    """Shares positions out to sources by weight."""

    def __init__(self, weights: Sequence[float]) -> None:
        """`weights` are relative, 0 or more, and not all 0."""
        turns = _turns_in_period(weights)
        self._period = sum(turns)
        self._source = np.array(_schedule(turns), np.int64)
        self._before = np.zeros((self._period + 1, len(turns)), np.int64)
        is_turn_of = self._source[:, None] == np.arange(len(turns))
        np.cumsum(is_turn_of, axis=0, out=self._before[1:])

    @property
    def shares(self) -> list[float]:
        """Fraction of the positions that each source gets."""
        return [float(turns / self._period) for turns in self._before[-1]]

    def sources(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The number of the source at each position, counted from 0."""
        return self._source[positions % self._period]

    def counts(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Turns of each source (..., K) before each of the `positions` (...)."""
        periods = positions // self._period
        return (
            periods[..., None] * self._before[-1] + self._before[positions - periods * self._period]
        )


def _turns_in_period(weights: Sequence[float]) -> list[int]:
    """Turns of each source in a period, as small as the weights allow."""
    # The decimals that a user typed, so that 0.7, 0.2 and 0.1 have a period of 10.
    exact = [Fraction(repr(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    turns = [number // math.gcd(*whole) for number in whole]
    if (total := sum(turns)) <= MAX_PERIOD:
        return turns
    # The largest remainders are rounded up. A source that has a weight keeps a turn.
    rounded = [max(number * MAX_PERIOD // total, int(number > 0)) for number in turns]
    by_remainder = sorted(
        range(len(turns)), key=lambda source: -(turns[source] * MAX_PERIOD % total)
    )
    for source in by_remainder[: max(0, MAX_PERIOD - sum(rounded))]:
        rounded[source] += 1
    return rounded


def _schedule(turns: Sequence[int]) -> list[int]:
    """The source of each position of a period."""
    period = sum(turns)
    # (first position of the next turn, source), and (position that it has to precede, source, turn)
    waiting = [(0, source) for source, count in enumerate(turns) if count]
    open_turns: list[tuple[int, int, int]] = []
    turn = [0] * len(turns)
    schedule = []
    for position in range(period):
        while waiting and waiting[0][0] <= position:
            _, source = heapq.heappop(waiting)
            deadline = -(-(turn[source] + 1) * period // turns[source])
            heapq.heappush(open_turns, (deadline, source, turn[source]))
        _, source, number = heapq.heappop(open_turns)
        schedule.append(source)
        turn[source] = number + 1
        if turn[source] < turns[source]:
            heapq.heappush(waiting, (turn[source] * period // turns[source], source))
    return schedule
