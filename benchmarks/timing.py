"""Device time and host time of a call.

On a GPU the calls are captured in a CUDA graph, so launch overhead is not measured. The replay of
the graph is timed between two CUDA events. After each call the L2 cache is flushed by reading a
buffer of four times its size. Two buffers alternate, so a flush never hits its own data. A second
graph holds only the flushes. It is timed in alternation with the first, and its time is subtracted.
The write-back of a call's dirty cache lines happens during the next flush, so the call pays for it.
One untimed flush precedes the first event and keeps the device busy while the graph is launched.
Calls alternate between different inputs and are repeated, so the 0.5 µs resolution of the events
does not matter. A call that waits for the host cannot be captured. It is timed between its own pair
of events, launches included. On a CPU (rehearsal only) the host clock replaces the events.
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
MIN_SAMPLES, MAX_SAMPLES = (5, 100) if torch.cuda.is_available() else (2, 10)
SECONDS = 0.1 if torch.cuda.is_available() else 0.01
"""Duration of one measurement."""
N_REPEATS = 5 if torch.cuda.is_available() else 1
"""Repeats of each call in one sample."""


class Timer(ABC):
    """Times a series of calls, each with a cold cache."""

    kind: str
    """Value of `KernelTime.timer`."""

    @abstractmethod
    def series(self, calls: Sequence[Call]) -> Callable[[], float]:
        """Prepare `calls`. The returned function runs them and returns device seconds."""

    def on_stream(self) -> AbstractContextManager[Any]:
        """Context for all timed calls, and for the forward of a timed backward."""
        return nullcontext()


class GraphTimer(Timer):
    """Times the replay of a CUDA graph between two events."""

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
    """Times each call between two events, including any launch latency the device waits for."""

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
    """Times each call with the host clock."""

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
    """Evicts the cache by reading a large buffer.

    It reads and does not write: dirty lines would be written back during the next call.
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
    """Timer for calls on `device`. `waits_for_host`: the call reads a result on the host."""
    if device.type == "cpu":
        return HostTimer()
    return EventTimer(device) if waits_for_host else GraphTimer(device)


def device_seconds(timer: Timer, calls: Sequence[Call], seconds: float = SECONDS) -> Spread:
    """Device seconds per call, measured for about `seconds`.

    `calls` are the same operation on different inputs. Run inside `timer.on_stream()`.
    """
    (spread,) = interleaved_seconds(timer, [calls], seconds)
    return spread


def interleaved_seconds(
    timer: Timer, variants: Sequence[Sequence[Call]], seconds: float = SECONDS
) -> list[Spread]:
    """Device seconds per call of each variant, measured for about `seconds` each.

    The samples of the variants are interleaved, so heat and clock changes affect all of them
    equally. Run inside `timer.on_stream()`.
    """
    for calls in variants:
        for _ in range(2):
            for call in calls:
                call()
    variants = [[*calls] * N_REPEATS for calls in variants]
    timed = [(timer.series(calls), _flushes_only(timer, len(calls))) for calls in variants]
    for run, idle in timed:
        run()
        idle()
    longest = max(run() for run, _ in timed)
    n_samples = min(max(round(seconds / max(longest, 1e-6)), MIN_SAMPLES), MAX_SAMPLES)
    samples = [[run() - idle() for run, idle in timed] for _ in range(n_samples)]
    return [
        Spread.of([sample / len(calls) for sample in column])
        for calls, column in zip(variants, zip(*samples, strict=True), strict=True)
    ]


def host_seconds(
    calls: Sequence[Call], device: torch.device, n_samples: int = 3 * MIN_SAMPLES
) -> Spread:
    """Wall seconds from launching one of `calls` until the device has finished it."""
    samples = []
    for sample in range(n_samples):
        synchronize(device)
        start = time.perf_counter()
        calls[sample % len(calls)]()
        synchronize(device)
        samples.append(time.perf_counter() - start)
    return Spread.of(samples)


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Peak bytes `call` allocates on top of the memory already in use; None on a CPU."""
    if device.type == "cpu":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def synchronize(device: torch.device) -> None:
    """Wait until the device is idle; no-op on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@cache
def _flushes_only(timer: Timer, n: int) -> Callable[[], float]:
    return timer.series([lambda: None] * n)
