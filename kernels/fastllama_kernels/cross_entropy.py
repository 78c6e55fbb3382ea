"""Cross-entropy: loss = lse - logits[target], lse = log(sum(exp(logits))), a row a token.

Shapes: logits (N, V), targets (N,) integers; loss (N,) or a scalar; lse (N,). Options, in the
order they apply: softcap c replaces logits by c * tanh(logits / c); label_smoothing e mixes in the
mean over the vocabulary, (1 - e) * loss + e * (lse - mean(logits)); z_loss adds z_loss * lse^2
(Chowdhery et al. 2022). Rows whose target is ignore_index have loss 0 and gradient 0 and do not
count in the mean; the mean over no rows is 0, where PyTorch gives NaN. Arithmetic is in float32
(float64 for float64 inputs).
"""

from typing import Literal

import torch
from torch import Tensor

from fastllama_kernels._dtype import accumulation_dtype


def cross_entropy_reference(
    logits_NV: Tensor,
    targets_N: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: Literal["none", "mean", "sum"] = "mean",
) -> tuple[Tensor, Tensor]:
    """Return the loss, float32, of `logits` (N, V) for `targets` (N,), and lse (N,)."""
    logits = logits_NV.to(accumulation_dtype(logits_NV))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    valid = targets_N != ignore_index
    lse = torch.logsumexp(logits, dim=-1)
    target_logit = logits.gather(-1, targets_N.where(valid, 0).long().unsqueeze(-1)).squeeze(-1)
    losses = (1 - label_smoothing) * (lse - target_logit)
    if label_smoothing:
        losses = losses + label_smoothing * (lse - logits.mean(dim=-1))
    losses = (losses + z_loss * lse.square()).where(valid, 0.0)
    return _reduce(losses, valid, reduction), lse


def _reduce(losses: Tensor, valid: Tensor, reduction: Literal["none", "mean", "sum"]) -> Tensor:
    if reduction == "none":
        return losses
    total = losses.sum()
    return total / valid.sum().clamp(min=1) if reduction == "mean" else total
