"""Spikes of the loss or the gradient norm, told by their z-scores on the device.

A value is a spike if it is more than z standard deviations above its mean, both over the recent
updates; the rule is that of OLMo-core's skip-step optimizer (Ai2 2024, `SkipStepOptimizer`: 128
updates, z = 6), where PaLM (Chowdhery et al. 2022, section 5.1) found that going on without the
batches around a spike is enough. Two things differ. Mean and variance are exponential and not of a
stored window, so their state is five numbers; with a share of 1/n for the n-th of the first
`WINDOW` updates they are the exact ones of what was seen (Finch 2009, "Incremental calculation of
weighted mean and variance"). And a spike counts as if it were just at the limit: one, however
high, moves the mean by z / `WINDOW` standard deviations, while a level that lasts widens them by
an eighth an update at z = 6 until it is no spike any more.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

WINDOW = 128
"""Updates over which the statistics forget, as a time constant."""
WARM_UP = 100
"""Updates seen before any is a spike: until then the spread is hardly known."""


class SpikeDetector:
    """Mean and variance of the finite updates of a run, and whether the next one is a spike.

    Every process has one and they agree, as what they see is averaged over all.
    """

    def __init__(self, z_score: float, device: torch.device, seen: Sequence[float] = ()) -> None:
        """Go on from `seen`, the `state` of before as a list."""
        self.state = torch.tensor(seen or [0.0] * 5, dtype=torch.float32, device=device)
        """Updates seen, means, and variances; (5,): two quantities."""
        self._z_score = z_score

    def restore(self, seen: Sequence[float]) -> None:
        """Go on from `seen`, the `state` of before as a list; from nothing where it is empty."""
        self.state = torch.tensor(seen or [0.0] * 5, dtype=torch.float32, device=self.state.device)

    def observe(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Whether loss and gradient norm are spikes, bool (2,); both are learnt from.

        Nothing is learnt, and nothing is a spike, where one of them is not finite.
        """
        values = torch.stack((loss, norm))
        n, mean, variance = self.state.split((1, 2, 2))
        limit = mean + self._z_score * variance.sqrt()
        spike = (n >= WARM_UP) & (values > limit)
        n = n + 1
        share = (1 / n).clamp(min=1 / WINDOW)
        distance = torch.where(spike, limit, values) - mean
        learnt = (n, mean + share * distance, (1 - share) * (variance + share * distance**2))
        is_known = values.isfinite().all()
        self.state = torch.where(is_known, torch.cat(learnt), self.state)
        return spike & is_known
