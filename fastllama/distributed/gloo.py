"""FSDP2 over gloo, the backend of CPUs: its collectives block the host.

On one machine, gathers and reductions go through shared memory, in rounds whose parts stay in the
cache. Gloo copies every byte through sockets several times. It still does the barriers, so a rank
that dies or hangs ends them as it ends any collective.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_collectives import (
    DefaultAllGather,
    DefaultReduceScatter,
)

from fastllama.distributed.shared_memory import SharedMemory


def uses_gloo() -> bool:
    """Whether the tensors of this run's device travel by gloo."""
    return dist.get_backend() == dist.Backend.GLOO


class SharedMemories:
    """The shared memory of each group, opened when the group first communicates."""

    def __init__(self) -> None:
        self._by_group: dict[dist.ProcessGroup, SharedMemory | None] = {}

    def of(self, group: dist.ProcessGroup) -> SharedMemory | None:
        """The memory of `group`, or None if its ranks share none. Every rank of it must call."""
        if group not in self._by_group:
            self._by_group[group] = SharedMemory.open(group)
        return self._by_group[group]


class GlooAllGather(DefaultAllGather):
    """Gathers through shared memory if the group has some, else by gloo."""

    def __init__(self, memories: SharedMemories) -> None:
        self._memories = memories

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False
    ) -> Any:
        """Write the `input` (N,) of all ranks to the output (ranks * N,), in the order of ranks."""
        memory = self._memories.of(group)
        if memory is None:
            return super().__call__(output_tensor, input_tensor, group, async_op)
        output_RN = output_tensor.view(group.size(), -1)
        length = memory.round_length(input_tensor.dtype)
        for start in range(0, len(input_tensor), length):
            part = slice(start, start + length)
            output_RN[:, part] = memory.exchange(input_tensor[part])
        return None


class GlooReduceScatter(DefaultReduceScatter):
    """Sends each rank its part, and adds the received parts in the order of the ranks.

    Gloo's own reduce-scatter is an all-reduce of a copy, which moves twice as many bytes.
    """

    def __init__(self, memories: SharedMemories) -> None:
        self._memories = memories

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: Any,
        op: Any,
        async_op: bool = False,
    ) -> Any:
        """Sum or average this rank's part (N,) of the `input` (ranks * N,) of every rank."""
        memory = self._memories.of(group)
        input_RN = input_tensor.view(group.size(), -1)
        if memory is None:
            received_RN = torch.empty_like(input_RN)
            dist.all_to_all_single(received_RN, input_RN, group=group)
            torch.sum(received_RN, dim=0, out=output_tensor)
        else:
            length = memory.round_length(input_tensor.dtype) // group.size()
            for start in range(0, len(output_tensor), length):
                part = slice(start, start + length)
                received_RRN = memory.exchange(input_RN[:, part])
                torch.sum(received_RRN[:, group.rank()], dim=0, out=output_tensor[part])
        if op == dist.ReduceOp.AVG:
            output_tensor /= group.size()
