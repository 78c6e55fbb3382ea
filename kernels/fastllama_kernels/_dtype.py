"""The type arithmetic is done in."""

import torch
from torch import Tensor


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """float32 for half-width inputs, the input's own type for float32 and float64."""
    return torch.promote_types(x.dtype, torch.float32)
