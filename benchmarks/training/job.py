"""What a contender is given, and what it hands back."""

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
    """What a child process is to do."""

    contender: str
    config: dict[str, dict[str, Any]]
    """A `Config` as dictionaries, its data written."""
    warm_ups: int
    """Updates before the timed ones; the first one compiles."""
    least_updates: int
    """Timed at least."""
    seconds: float
    """Timed at least."""
    spawned_at: float
    """When the parent started the process, `time.time()`."""
    plain_operators: list[str] = field(default_factory=list)
    """Fields of `Operators` that fastllama is to take from REFERENCE."""
    deadline: float | None = None
    """A moment of `time.time()`, towards which one timed update is enough."""


@dataclass(frozen=True)
class Outcome:
    """What came of it."""

    losses: list[float] = field(default_factory=list)
    """Of every update, the warm-ups too."""
    update_seconds: list[float] = field(default_factory=list)
    """Of the timed updates."""
    seconds_to_first_update: float | None = None
    peak_bytes: int | None = None
    sm_clock_mhz: float | None = None
    power_watts: float | None = None
    details: str = ""
    failure: str = ""
    """The last line of the error, where there was one."""
    is_out_of_memory: bool = False


class Trained(NamedTuple):
    """What a contender hands back: the loss and the seconds of every update."""

    losses: list[float]
    seconds: list[float]
    details: str


class Pace:
    """Decides after each update whether there are enough; clock and power are those of the timed.

    Watching the device begins with the timed updates, because it idles while the host compiles.
    """

    def __init__(self, spec: Spec, held: ExitStack) -> None:
        self.seconds_to_first_update: float | None = None
        self.monitor = GpuMonitor()
        self._spec, self._held = spec, held
        self._n_updates, self._begin, self._last = 0, 0.0, 0.0

    def enough(self) -> bool:
        """Count an update that is done, or that the device was handed."""
        self._n_updates += 1
        if self._n_updates == 1:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds_to_first_update = time.time() - self._spec.spawned_at
        if self._n_updates == self._spec.warm_ups:
            self._held.enter_context(self.monitor)
            self._begin = time.perf_counter()
        last, self._last = self._last, time.perf_counter()
        n_timed = self._n_updates - self._spec.warm_ups
        # fastllama hears of the stop an update or two later.
        end = time.time() + 2 * (self._last - last)
        if n_timed >= 1 and self._spec.deadline is not None and end > self._spec.deadline:
            return True
        return (
            n_timed >= self._spec.least_updates
            and time.perf_counter() - self._begin >= self._spec.seconds
        )


class Job(NamedTuple):
    """What a contender is given."""

    config: Config
    device: torch.device
    pace: Pace
    plain_operators: list[str]
