"""Inputs and outputs of a contender."""

import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.conditions import GpuMonitor
from fastllama.config import Config

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Spec:
    """Task of a child process."""

    contender: str
    config: dict[str, dict[str, Any]]
    """`Config.to_dict()`. Its data folder exists already."""
    warm_ups: int
    """Untimed updates at the start. The first one compiles."""
    min_updates: int
    """Least number of timed updates."""
    seconds: float
    """Least duration of the timed updates together."""
    plain_operators: list[str] = field(default_factory=list)
    """Fields of `Operators` that fastllama takes from REFERENCE."""
    deadline: float | None = None
    """`time.time()` by which to finish. Close to it one timed update is enough."""


@dataclass(frozen=True)
class Outcome:
    """Result of a child process."""

    losses: list[float] = field(default_factory=list)
    """Loss of every update, warm-up included."""
    update_seconds: list[float] = field(default_factory=list)
    """Duration of each timed update."""
    seconds_to_first_update: float | None = None
    peak_bytes: int | None = None
    sm_clock_mhz: float | None = None
    power_watts: float | None = None
    details: str = ""
    failure: str = ""
    """The exception, the last line of stderr, or how the process ended; empty on success."""
    is_out_of_memory: bool = False


class Trained(NamedTuple):
    """Result of a training function: loss and seconds of every update, warm-up included."""

    losses: list[float]
    seconds: list[float]
    details: str


class Budget:
    """Decides after each update whether to stop. Monitors clock and power of the timed updates.

    The monitor starts after the warm-up, because the device idles while the host compiles.
    """

    def __init__(self, spec: Spec, stack: ExitStack) -> None:
        self.seconds_to_first_update: float | None = None
        self.monitor = GpuMonitor()
        self._spec, self._stack = spec, stack
        self._created_at = time.perf_counter()
        self._n_updates, self._begin, self._last = 0, 0.0, 0.0

    def is_spent(self) -> bool:
        """Count one finished or launched update; True if the contender should stop."""
        self._n_updates += 1
        if self._n_updates == 1:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds_to_first_update = time.perf_counter() - self._created_at
        if self._n_updates == self._spec.warm_ups:
            self._stack.enter_context(self.monitor)
            self._begin = time.perf_counter()
        last, self._last = self._last, time.perf_counter()
        n_timed = self._n_updates - self._spec.warm_ups
        # fastllama reacts to the stop one or two updates later.
        end = time.time() + 2 * (self._last - last)
        if n_timed >= 1 and self._spec.deadline is not None and end > self._spec.deadline:
            return True
        return (
            n_timed >= self._spec.min_updates
            and time.perf_counter() - self._begin >= self._spec.seconds
        )


class Job(NamedTuple):
    """Arguments of a training function."""

    config: Config
    device: torch.device
    budget: Budget
    plain_operators: list[str]
