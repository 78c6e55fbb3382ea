"""The clock of training, and scalars that arrive a step late."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Clock:
    """Seconds since training began, in all and without validation, samples and checkpoints."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._aside = 0.0

    def wall(self) -> float:
        return time.perf_counter() - self._start

    def launched(self) -> None:
        """Note that the whole of an update was handed to the device."""

    def training(self) -> float:
        """Those of the updates; to be asked where the last one launched is known to be done."""
        return self.wall() - self._aside

    @contextmanager
    def side_job(self) -> Iterator[None]:
        """Leave the time inside out of `training`."""
        before = self.wall()
        try:
            yield
        finally:
            self._aside += self.wall() - before


class DeviceClock(Clock):
    """A `Clock` whose training time is that between events on the current CUDA stream.

    The host notices the end of an update when it has launched the next one, but before a side job
    at once: by its own clock the update before one is too short, and the one after it too long.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seconds = 0.0
        self._begin = self._end = self._record()

    def launched(self) -> None:
        self._end = self._record()

    def training(self) -> float:
        self._end.synchronize()
        self._seconds += self._begin.elapsed_time(self._end) / 1000
        self._begin = self._end
        return self._seconds

    @contextmanager
    def side_job(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._begin = self._record()

    def _record(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class LateScalars:
    """Carries a small vector off the device without making the host wait for the step it is from.

    `send` starts the copy to pinned memory; `receive`, called after the next step was launched,
    waits only for a copy that is long done.
    """

    def __init__(self) -> None:
        self._host: Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def send(self, values: Tensor) -> None:
        """Start copying a 1-D float tensor."""
        if values.device.type == "cpu":
            self._host = values
            return
        self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        self._host.copy_(values, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()

    def receive(self) -> list[float]:
        """The values last sent."""
        assert self._host is not None
        if self._copied is not None:
            self._copied.synchronize()
        return self._host.tolist()
