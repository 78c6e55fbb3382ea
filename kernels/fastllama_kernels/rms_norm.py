"""RMSNorm: y = x * rstd * weight, rstd = 1 / sqrt(mean(x^2) + eps), over the last dimension.

With a residual stream: residual_out = x + residual, y = rms_norm(residual_out), y in the type of x.
Shapes: x, residual, y (..., D), any float type; weight (D,). Sums and products are in float32
(float64 for float64 inputs), with one rounding to the type of x at the end.
Source: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467.
"""

import torch
from torch import Tensor

from fastllama_kernels._dtype import accumulation_dtype


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension of `x` (..., D) and scale it by `weight` (D,)."""
    wide = x.to(accumulation_dtype(x))
    rstd = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * rstd * weight).to(x.dtype)


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Add `x` to the `residual` stream, both (..., D); return (normalised sum, sum)."""
    residual = residual + x
    return rms_norm_reference(residual, weight, eps).to(x.dtype), residual
