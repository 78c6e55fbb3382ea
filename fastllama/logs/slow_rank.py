"""Finds the rank that the others wait for."""

from collections import deque

import numpy as np

WINDOW = 8
"""Updates over which the median is taken. One update tells nothing: a rank may have just saved."""


class SlowRank:
    """Compares the seconds that ranks spend in collectives. Who comes last spends the fewest."""

    def __init__(self, n_groups: int) -> None:
        """`n_groups` is the number of replicas: neighbouring ranks, which wait for each other."""
        self._n_groups = n_groups
        self._recent: deque[list[float]] = deque(maxlen=WINDOW)

    def observe(self, collective_seconds: list[float]) -> None:
        """Add the seconds of each rank in one update."""
        self._recent.append(collective_seconds)

    def find(self) -> tuple[int, float] | None:
        """The rank that most is waited for, and the seconds an update that the others wait for it.

        None before `WINDOW` updates. The others are the median rank of its replica.
        """
        if len(self._recent) < WINDOW:
            return None
        seconds = np.median(self._recent, axis=0).reshape(self._n_groups, -1)
        n_ranks = seconds.shape[1]
        waits = np.sort(seconds, axis=1)[:, n_ranks // 2, None] - seconds
        rank = int(waits.argmax())
        return rank, float(waits.flat[rank])
