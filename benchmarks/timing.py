"""How long a call takes on the device, and on the host.

On a GPU the calls are captured in a CUDA graph, so that launching costs nothing, and the graph is
timed between two events. After every call the L2 cache is flushed by reading a buffer four times
its size, in turn one of two, so that no flush finds its own. A second graph of the flushes alone is
timed in turn, and the difference is the calls'. So what a call leaves in the cache, to be written
back during the next flush, is charged to it. One more flush, which is not timed, comes before the
first event: it has the device busy while the graph is launched. Calls use different inputs one
after the other, and repeat, so that the clock's steps of half a microsecond do not count. A call
that waits for the host cannot be captured; it is timed between events of its own, launches
included. On a CPU, for a rehearsal, a clock takes the place of the events.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from itertools import cycle
from typing import Any

import torch

from benchmarks.results import Spread

Call = Callable[[], object]

CPU_FLUSH_BYTES = 2**22
FEWEST_SAMPLES, MOST_SAMPLES = (5, 100) if torch.cuda.is_available() else (2, 10)
SECONDS = 0.1 if torch.cuda.is_available() else 0.01
"""That one measurement takes."""
N_REPEATS = 5 if torch.cuda.is_available() else 1
"""Of every call in one sample."""


class Timer(ABC):
    """Times a series of calls, each with cold caches."""

    kind: str
    """As `KernelTime.timer`."""

    @abstractmethod
    def series(self, calls: Sequence[Call]) -> Callable[[], float]:
        """Prepare `calls`; the result runs them and returns seconds of the device."""

    def on_stream(self) -> AbstractContextManager[Any]:
        """Where all that is timed, and the forward of a backward, has to run."""
        return nullcontext()


class GraphTimer(Timer):
    """Replays of a CUDA graph, between two events."""

    kind = "graph"

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._flush_before, self._flush = _Flush(device, 1), _Flush(device, 2)

    def series(self, calls: Sequence[Call]) -> Callable[[], float]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            for call in calls:
                call()
                self._flush()

        def run() -> float:
            self._flush_before()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1000

        return run

    def on_stream(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream)


class EventTimer(Timer):
    """Events around every call; a launch that the device waits for counts."""

    kind = "events"

    def __init__(self, device: torch.device) -> None:
        self._flush_before, self._flush = _Flush(device, 1), _Flush(device, 2)

    def series(self, calls: Sequence[Call]) -> Callable[[], float]:
        def run() -> float:
            pairs = []
            self._flush_before()
            for call in calls:
                pair = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
                pair[0].record()
                call()
                self._flush()
                pair[1].record()
                pairs.append(pair)
            torch.cuda.synchronize()
            return sum(start.elapsed_time(end) for start, end in pairs) / 1000

        return run


class HostTimer(Timer):
    """A CPU's clock around every call."""

    kind = "host"

    def __init__(self) -> None:
        self._flush = _Flush(torch.device("cpu"), 1)

    def series(self, calls: Sequence[Call]) -> Callable[[], float]:
        def run() -> float:
            seconds = 0.0
            for call in calls:
                self._flush()
                start = time.perf_counter()
                call()
                seconds += time.perf_counter() - start
            return seconds

        return run


class _Flush:
    """Fills the cache with lines of no use to anyone.

    Clean ones: what writing leaves behind would be written back at the expense of the next call.
    """

    def __init__(self, device: torch.device, n_buffers: int) -> None:
        size = CPU_FLUSH_BYTES
        if device.type == "cuda":
            size = 4 * torch.cuda.get_device_properties(device).L2_cache_size
        self._buffers = cycle([torch.ones(size // 4, device=device) for _ in range(n_buffers)])
        self._sum = torch.empty((), device=device)

    def __call__(self) -> None:
        torch.sum(next(self._buffers), dim=0, out=self._sum)


@cache
def make_timer(device: torch.device, *, waits_for_host: bool = False) -> Timer:
    """The best timer for calls on `device` that do, or do not, wait for their own results."""
    if device.type == "cpu":
        return HostTimer()
    return EventTimer(device) if waits_for_host else GraphTimer(device)


def device_seconds(timer: Timer, calls: Sequence[Call], seconds: float = SECONDS) -> Spread:
    """Seconds of the device for one of `calls`, over about `seconds` of measuring.

    The calls do the same on different inputs. Run inside `timer.on_stream()`.
    """
    (spread,) = side_by_side(timer, [calls], seconds)
    return spread


def side_by_side(
    timer: Timer, variants: Sequence[Sequence[Call]], seconds: float = SECONDS
) -> list[Spread]:
    """Seconds of one call of each variant, over about `seconds` of measuring each.

    Samples of the variants are taken in turn, so that a device that becomes hotter or slower in
    the meantime does so for all of them. Run inside `timer.on_stream()`.
    """
    for calls in variants:
        for _ in range(2):
            for call in calls:
                call()
    variants = [[*calls] * N_REPEATS for calls in variants]
    timed = [(timer.series(calls), _flushes_alone(timer, len(calls))) for calls in variants]
    for run, idle in timed:
        run()
        idle()
    longest = max(run() for run, _ in timed)
    n_samples = min(max(round(seconds / max(longest, 1e-6)), FEWEST_SAMPLES), MOST_SAMPLES)
    samples = [[run() - idle() for run, idle in timed] for _ in range(n_samples)]
    return [
        Spread.of([sample / len(calls) for sample in column])
        for calls, column in zip(variants, zip(*samples, strict=True), strict=True)
    ]


def host_seconds(
    calls: Sequence[Call], device: torch.device, n_samples: int = 3 * FEWEST_SAMPLES
) -> Spread:
    """Wall seconds of one of `calls` that is waited for, with what it takes to launch it."""
    samples = []
    for sample in range(n_samples):
        synchronize(device)
        start = time.perf_counter()
        calls[sample % len(calls)]()
        synchronize(device)
        samples.append(time.perf_counter() - start)
    return Spread.of(samples)


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Bytes `call` allocates at most, beyond what was there before; None on a CPU."""
    if device.type == "cpu":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def synchronize(device: torch.device) -> None:
    """Wait for the device; a CPU is always done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@cache
def _flushes_alone(timer: Timer, n: int) -> Callable[[], float]:
    return timer.series([lambda: None] * n)
