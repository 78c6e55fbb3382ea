"""AdamW over sharded parameters. It clips gradients and skips bad updates on the device."""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastllama.config import OptimizerConfig
from fastllama.optim.spikes import SpikeDetector

SKIP_REASONS = (
    "",
    "the loss or the gradient norm is not finite",
    "the gradient norm is a spike",
    "the loss is a spike",
)
"""Why an update is skipped, by the number that `update` returns; 0 means it is applied."""


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov and Hutter 2019) that decays matrices, not norms or embeddings."""
    decayed: list[nn.Parameter] = []
    not_decayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and not name.startswith("embedding.")
        (decayed if is_matrix else not_decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": not_decayed, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=config.max_lr,
        betas=(config.beta1, config.beta2),
        eps=config.adam_eps,
        fused=True,
    )
    # AdamW allocates its state in the first step, but a checkpoint is loaded before it.
    for parameter in [*decayed, *not_decayed]:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


@torch.no_grad()
def update(
    optimizer: torch.optim.AdamW,
    loss: Tensor,
    max_norm: float,
    spikes: SpikeDetector | None = None,
) -> tuple[Tensor, Tensor]:
    """Apply one update, or skip it if `loss` or the gradient norm is not finite or is a spike.

    A gradient norm above `max_norm` is scaled down to it; `max_norm` 0 never clips. A skipped
    update leaves parameters, moments and AdamW's step count unchanged. The fused kernel does both,
    through the two scalars that a gradient scaler would pass to it: the host reads nothing, and no
    extra pass over the gradients runs.

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
        # Each replica sums the norm by itself. If one applied an update that another skipped, the
        # replicas would train different models from then on.
        dist.all_reduce(skipped, dist.ReduceOp.MAX)
    # AdamW divides gradients by grad_scale, and does nothing where found_inf is 1.
    optimizer.grad_scale = (norm / (max_norm or math.inf)).clamp(min=1.0)  # type: ignore[attr-defined]
    optimizer.found_inf = skipped.clamp(max=1.0)  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, skipped
