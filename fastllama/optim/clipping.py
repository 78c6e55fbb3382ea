"""One optimizer update. The device clips gradients and skips a bad update."""

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastllama.optim.spikes import SpikeDetector

SKIP_REASONS = (
    "",
    "the loss or the gradient norm is not finite",
    "the gradient norm is a spike",
    "the loss is a spike",
)
"""Why an update is skipped, by the number that `update` returns; 0 means it is applied."""


@torch.no_grad()
def update(
    optimizer: torch.optim.AdamW,
    loss: Tensor,
    max_norm: float,
    spikes: SpikeDetector | None = None,
) -> tuple[Tensor, Tensor]:
    """Apply one update, or skip it if `loss` or the gradient norm is not finite or is a spike.

    A gradient norm above `max_norm` is scaled down to it; `max_norm` 0 never clips. A skipped
    update leaves parameters, moments and AdamW's step count unchanged. The fused kernel scales and
    skips by the two scalars that a gradient scaler would pass to it. So the host reads nothing, and
    there is no extra pass over the gradients.

    Returns:
        The global gradient norm before clipping, and the index of the reason in `SKIP_REASONS`.
        Both are float32 scalars on the device. The index is the same on every rank.
    """
    gradients = [
        parameter.grad
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    ]
    norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
    has_replicas = False
    if isinstance(norm, DTensor):
        has_replicas = norm.device_mesh.ndim > 1
        norm = norm.full_tensor()
    skipped = (~(norm.isfinite() & loss.isfinite())).float()
    if spikes is not None:
        loss_spike, norm_spike = spikes.observe(loss, norm).float()
        skipped = torch.stack((skipped, 3 * loss_spike, 2 * norm_spike)).amax()
    if has_replicas:
        # Each replica computes the norm itself. If one replica applied an update that another one
        # skipped, they would train different models from then on.
        dist.all_reduce(skipped, dist.ReduceOp.MAX)
    # AdamW divides gradients by grad_scale, and does nothing where found_inf is 1.
    optimizer.grad_scale = (norm / (max_norm or math.inf)).clamp(min=1.0)  # type: ignore[attr-defined]
    optimizer.found_inf = skipped.clamp(max=1.0)  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, skipped
