"""Clocks that separate training from side jobs."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Seconds since training began, with and without side jobs."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._side_jobs = 0.0

    def wall(self) -> float:
        """Seconds since training began."""
        return time.perf_counter() - self._start

    def launched(self) -> None:
        """Mark that the host has launched a whole update."""

    def training(self) -> float:
        """Training seconds so far.

        Call only after the last launched update has finished on the device.
        """
        return self.wall() - self._side_jobs

    @contextmanager
    def side_job(self) -> Iterator[None]:
        """Exclude the time inside from `training`."""
        before = self.wall()
        try:
            yield
        finally:
            self._side_jobs += self.wall() - before


class DeviceClock(Clock):
    """A `Clock` whose training seconds are measured between events on the current CUDA stream.

    The host reads an update's end after it has launched the next update, but before a side job it
    reads the end at once. By the host's clock the update before a side job would be too short, and
    the update after it too long.
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
