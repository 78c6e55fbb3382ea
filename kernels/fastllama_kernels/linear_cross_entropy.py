"""Linear cross-entropy: the cross-entropy of hidden @ weight^T, mean over the tokens.

Shapes: hidden (..., D), weight (V, D), targets (...) integers; loss a float32 scalar (float64 for
float64 inputs). Rows whose target is ignore_index count for nothing; the mean over no rows is 0.
The reference holds all (N, V) logits at once, in the accumulation type.
"""

from torch import Tensor
from torch.nn import functional as F

from fastllama_kernels._dtype import accumulation_dtype


def linear_cross_entropy_reference(
    hidden: Tensor, weight_VD: Tensor, targets: Tensor, *, ignore_index: int = -100
) -> Tensor:
    """Return the mean loss of projecting `hidden` (..., D) on `weight` (V, D) for `targets`."""
    logits_NV = F.linear(hidden.flatten(0, -2), weight_VD)
    logits_NV = logits_NV.to(accumulation_dtype(logits_NV))
    targets_N = targets.flatten()
    total = F.cross_entropy(logits_NV, targets_N, ignore_index=ignore_index, reduction="sum")
    return total / (targets_N != ignore_index).sum().clamp(min=1)
