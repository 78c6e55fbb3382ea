"""Spikes of the loss or the gradient norm, found by their z-scores on the device.

A value is a spike if it lies more than z standard deviations above the mean of recent updates. The
rule is that of OLMo-core's skip-step optimizer (Ai2 2024, `SkipStepOptimizer`: 128 updates, z = 6).
PaLM (Chowdhery et al. 2022, section 5.1) found that skipping the batches around a spike is enough.

Two things differ from OLMo-core. First, mean and variance are exponential and need no stored
window: the state is five numbers. The n-th of the first `WINDOW` updates has weight 1/n, so the
statistics are exact until then (Finch 2009, "Incremental calculation of weighted mean and
variance"). Second, a spike enters the statistics as if it were exactly at the limit. A single
spike, however high, then moves the mean by z / `WINDOW` standard deviations. If values stay high,
the limit widens by an eighth per update at z = 6, until they are no spikes any more.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

WINDOW = 128
"""Time constant of the statistics, in updates."""
WARM_UP = 100
"""Updates observed before any counts as a spike: fewer are too few to estimate the variance."""


class SpikeDetector:
    """Mean and variance of the finite updates of a run; tells whether the next one is a spike.

    Every rank has a detector. All agree, because loss and norm are averaged over the ranks first.
    """

    def __init__(self, z_score: float, device: torch.device, seen: Sequence[float] = ()) -> None:
        """Start from `seen`, a saved `state` as a list."""
        self.state = torch.tensor(seen or [0.0] * 5, dtype=torch.float32, device=device)
        """(5,) float32: updates observed, two means, two variances; loss first, then norm."""
        self._z_score = z_score

    def restore(self, seen: Sequence[float]) -> None:
        """Restart from `seen`, a saved `state` as a list; an empty list forgets everything."""
        self.state = torch.tensor(seen or [0.0] * 5, dtype=torch.float32, device=self.state.device)

    def observe(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Return whether loss and gradient norm are spikes, bool (2,), and update the statistics.

        If either is not finite, nothing is a spike and the statistics stay.
        """
        values = torch.stack((loss, norm))
        n, mean, variance = self.state.split((1, 2, 2))
        limit = mean + self._z_score * variance.sqrt()
        spike = (n >= WARM_UP) & (values > limit)
        n = n + 1
        share = (1 / n).clamp(min=1 / WINDOW)
        distance = torch.where(spike, limit, values) - mean
        updated = (n, mean + share * distance, (1 - share) * (variance + share * distance**2))
        is_finite = values.isfinite().all()
        self.state = torch.where(is_finite, torch.cat(updated), self.state)
        return spike & is_finite
