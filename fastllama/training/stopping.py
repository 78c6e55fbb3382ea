"""Stopping early: on a signal, or when the time is up."""

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch

from fastllama.distributed.world import World

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclass
class StopSignal:
    """Whether this process was asked to stop."""

    deadline: float = math.inf
    """Value of `time.perf_counter` when the time is up."""
    signalled: bool = False

    @property
    def requested(self) -> bool:
        """Whether a signal came or the time is up."""
        return self.signalled or time.perf_counter() >= self.deadline

    def agreed(self, world: World) -> bool:
        """Whether any process was asked to stop. Every process calls this and gets the same."""
        return bool(world.mean(torch.full((), float(self.requested))) > 0)


@contextmanager
def stop_signals(deadline: float = math.inf) -> Iterator[StopSignal]:
    """Turn the first of `STOP_SIGNALS` into a request to stop. A second one ends the process."""
    stop = StopSignal(deadline)

    def request(number: int, frame: FrameType | None) -> None:
        stop.signalled = True
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        # Not print: the signal may have interrupted one.
        name = signal.Signals(number).name
        os.write(2, f"{name}: saving, then stopping; send it again to stop now\n".encode())

    previous = {number: signal.signal(number, request) for number in STOP_SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
