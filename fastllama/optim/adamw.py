"""AdamW over sharded parameters, with clipping and the refusal of bad updates on the device."""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastllama.config import OptimizerConfig
from fastllama.optim.spikes import SpikeDetector

REFUSALS = (
    "",
    "the loss or the gradient norm is not finite",
    "the gradient norm is a spike",
    "the loss is a spike",
)
"""Why an update is refused, by the number that `update` gives; 0 stands for none."""


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov and Hutter 2019) that decays matrices, not norms or embeddings."""
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and not name.startswith("embedding.")
        (decayed if is_matrix else kept).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=config.max_lr,
        betas=(config.beta1, config.beta2),
        eps=config.adam_eps,
        fused=True,
    )
    # AdamW would allocate these at its first step; a checkpoint needs somewhere to load into.
    for parameter in [*decayed, *kept]:
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
    """Apply one update from the gradients, unless `loss` or their norm is not finite or a spike.

    A norm above `max_norm` is scaled down to it, unless that is 0. A bad update leaves parameters,
    moments and AdamW's step count as they were. Clipping and the refusal happen inside the fused
    kernel, through the two scalars a gradient scaler would hand it, so nothing is read on the host
    and no extra pass over the gradients is made.

    Returns:
        The global gradient norm before clipping and the number of the refusal in `REFUSALS`, both
        float32 scalars on the device; the number is the same on every process.
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
    refused = (~(norm.isfinite() & loss.isfinite())).float()
    if spikes is not None:
        loss_spike, norm_spike = spikes.observe(loss, norm).float()
        refused = torch.stack((refused, 3 * loss_spike, 2 * norm_spike)).amax()
    if has_replicas:
        # Each replica sums the norm on its own; one that applied what another refused would from
        # then on be another model.
        dist.all_reduce(refused, dist.ReduceOp.MAX)
    # AdamW divides gradients by grad_scale and does nothing where found_inf is 1.
    optimizer.grad_scale = (norm / (max_norm or math.inf)).clamp(min=1.0)  # type: ignore[attr-defined]
    optimizer.found_inf = refused.clamp(max=1.0)  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, refused
