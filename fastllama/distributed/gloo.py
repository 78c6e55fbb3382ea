"""FSDP2 over gloo, the backend of CPUs: its collectives block the host."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter


def uses_gloo() -> bool:
    """Whether the tensors of this run's device travel by gloo."""
    return dist.get_backend() == dist.Backend.GLOO


class GlooReduceScatter(DefaultReduceScatter):
    """Sends each rank its part, and adds the received parts in the order of the ranks.

    Gloo's own reduce-scatter is an all-reduce of a copy, which moves twice as many bytes.
    """

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: Any,
        op: Any,
        async_op: bool = False,
    ) -> Any:
        """Sum or average this rank's part (N,) of the `input` (ranks * N,) of every rank."""
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        torch.sum(received.view(group.size(), -1), dim=0, out=output_tensor)
        if op == dist.ReduceOp.AVG:
            output_tensor /= group.size()
