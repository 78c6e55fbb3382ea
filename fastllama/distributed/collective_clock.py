"""Seconds that a rank spends in FSDP2's collectives. A slow rank spends the fewest: it comes last.

A collective ends at the same time on all its ranks, and begins when a rank comes to it. So its
length is the wire's time and the wait for the last rank, however the rank was delayed: by a slow
device, a busy host, or its data. Nothing waits in order to measure this.
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import (
    DefaultAllGather,
    DefaultReduceScatter,
)

from fastllama.distributed.gloo import (
    GlooAllGather,
    GlooReduceScatter,
    SharedMemories,
    uses_gloo,
)


class HostEvent:
    """A `torch.cuda.Event` of the host, where collectives block."""

    def record(self) -> None:
        self._time = time.perf_counter()

    def elapsed_time(self, end: "HostEvent") -> float:
        """Milliseconds from this event to `end`."""
        return 1000 * (end._time - self._time)


class CollectiveClock:
    """Sums the lengths of this rank's collectives, update by update."""

    def __init__(self) -> None:
        # Start and end of the collectives of this update and of the two before it.
        self._updates: deque[list[tuple[Any, Any]]] = deque([[], [], []], maxlen=3)

    def lap(self) -> float:
        """Begin an update.

        Returns:
            Seconds in the collectives of the update before the last one. The device has done these,
            because the host reads each result one update late.
        """
        self._updates.append([])
        return sum(start.elapsed_time(end) for start, end in self._updates[0]) / 1000

    @contextmanager
    def collective(self, on_cuda: bool) -> Iterator[None]:
        """Measure the collective inside, on the current stream."""
        start, end = (
            torch.cuda.Event(enable_timing=True) if on_cuda else HostEvent() for _ in range(2)
        )
        start.record()
        yield
        end.record()
        self._updates[-1].append((start, end))

    def install(self, model: nn.Module) -> None:
        """Measure all gathers and reduce-scatters of a sharded model."""
        gather, reduce_scatter = DefaultAllGather(), DefaultReduceScatter()
        if uses_gloo():
            memories = SharedMemories()
            gather, reduce_scatter = GlooAllGather(memories), GlooReduceScatter(memories)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_all_gather(_TimedAllGather(self, gather))
                module.set_custom_reduce_scatter(_TimedReduceScatter(self, reduce_scatter))


class _TimedAllGather(DefaultAllGather):
    def __init__(self, clock: CollectiveClock, gather: DefaultAllGather) -> None:
        self._clock, self._gather = clock, gather

    def __call__(self, output_tensor: Tensor, *args: Any, **options: Any) -> Any:
        with self._clock.collective(output_tensor.is_cuda):
            return self._gather(output_tensor, *args, **options)


class _TimedReduceScatter(DefaultReduceScatter):
    def __init__(self, clock: CollectiveClock, reduce_scatter: DefaultReduceScatter) -> None:
        self._clock, self._reduce_scatter = clock, reduce_scatter

    def __call__(self, output_tensor: Tensor, *args: Any, **options: Any) -> Any:
        with self._clock.collective(output_tensor.is_cuda):
            return self._reduce_scatter(output_tensor, *args, **options)
