"""The denominator of a softmax, in two numbers."""

import math

from torch import Tensor


def maximum_and_log_sum(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return m = max(logits) and log(sum(exp(logits - m))) over the last dimension.

    lse is their sum. The gradient flows through the second. m is a constant; 0 if it is -inf.
    """
    maximum = logits.detach().amax(dim=-1)
    maximum = maximum.where(maximum != -math.inf, 0.0)
    return maximum, (logits - maximum.unsqueeze(-1)).exp().sum(dim=-1).log()
