"""Stopping early: on a signal, or when the time is up."""

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

import torch

from fastllama.distributed.world import World

SHOW_CURSOR = b"\x1b[?25h"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


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
        """Whether any process was asked to stop. All processes call this and get one answer."""
        return bool(world.mean(torch.full((), float(self.requested))) > 0)


@contextmanager
def stop_signals(deadline: float = math.inf) -> Iterator[StopSignal]:
    """Turn the first of `STOP_SIGNALS` into a request to stop. A second one ends the process.

    SIGHUP never ends it: shell and kernel both send one when a terminal closes. Where SIGHUP is
    ignored, as under nohup, it stays ignored.
    """
    stop = StopSignal(deadline)

    def request(number: int, frame: FrameType | None) -> None:
        stop.signalled = True
        for each in handled:
            signal.signal(each, signal.SIG_IGN if each == signal.SIGHUP else signal.SIG_DFL)
        # os.write, because the signal may have interrupted a print.
        name = signal.Signals(number).name
        again = "send SIGTERM" if number == signal.SIGHUP else "send it again"
        message = f"{name}: saving, then stopping; {again} to stop now\n"
        # The terminal may be gone.
        with suppress(OSError):
            os.write(2, message.encode())
        # A second signal would leave the cursor as the progress bar has it: hidden.
        for stream in (1, 2):
            with suppress(OSError):
                if os.isatty(stream):
                    os.write(stream, SHOW_CURSOR)

    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    handled = [each for each in STOP_SIGNALS if not (ignored and each == signal.SIGHUP)]
    previous = {number: signal.signal(number, request) for number in handled}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
