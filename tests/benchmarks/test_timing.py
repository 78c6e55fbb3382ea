"""Arithmetic of the timers, with fake clocks."""

import time
from collections.abc import Callable, Sequence

import pytest
import torch

from benchmarks.ceilings import copy_ceilings
from benchmarks.timing import (
    MAX_SAMPLES,
    MIN_SAMPLES,
    Call,
    Timer,
    device_seconds,
    host_seconds,
    make_timer,
)
from tests.compare import DEVICE

FLUSH_SECONDS = 0.25


class FakeTimer(Timer):
    """Reports 0.25 s per flush, and the return value of a call as its seconds."""

    kind = "fake"

    def __init__(self) -> None:
        self.n_runs = 0

    def series(self, calls: Sequence[Call]) -> Callable[[], float]:
        def run() -> float:
            self.n_runs += 1
            return sum(FLUSH_SECONDS + (call() or 0.0) for call in calls)  # type: ignore[misc]

        return run


def test_device_seconds_subtracts_flushes() -> None:
    spread = device_seconds(FakeTimer(), [lambda: 2.0, lambda: 4.0])
    assert (spread.low, spread.median, spread.high) == pytest.approx((3.0, 3.0, 3.0))


@pytest.mark.parametrize(("seconds", "n"), [(0.0, MIN_SAMPLES), (1e9, MAX_SAMPLES)])
def test_number_of_samples(seconds: float, n: int) -> None:
    timer = FakeTimer()
    assert device_seconds(timer, [lambda: 1.0], seconds).n == n
    # One run each of calls and flushes per sample and for warm-up, one more to estimate the time.
    assert timer.n_runs == 2 * n + 3


def test_calls_alternate() -> None:
    order: list[int] = []
    device_seconds(FakeTimer(), [lambda: order.append(0), lambda: order.append(1)])
    assert order == [0, 1] * (len(order) // 2)


@pytest.mark.parametrize("waits_for_host", [False, True])
def test_device_seconds_of_known_duration(waits_for_host: bool) -> None:
    device = torch.device(DEVICE)
    timer = make_timer(device, waits_for_host=waits_for_host)
    kinds = {"cpu": "host", "cuda": "events" if waits_for_host else "graph"}
    assert timer.kind == kinds[device.type]
    if device.type == "cpu":
        # A sleep is never shorter than requested. On a busy machine it may be much longer.
        measured = device_seconds(timer, [lambda: time.sleep(0.01)])
        assert measured.low >= 0.01
        return
    n_cycles = 10_000_000
    with timer.on_stream():
        once, twice = (
            device_seconds(timer, [lambda count=count: torch.cuda._sleep(count * n_cycles)])
            for count in (1, 2)
        )
    assert twice.median == pytest.approx(2 * once.median, rel=0.1)


def test_host_seconds_include_the_call() -> None:
    assert host_seconds([lambda: time.sleep(0.01)], torch.device(DEVICE)).low >= 0.01


@pytest.mark.gpu
def test_write_back_counts_for_the_call() -> None:
    """The results fit into half of the L2 cache; without write-back they would seem faster."""
    device = torch.device("cuda")
    timer = make_timer(device)
    n_bytes = torch.cuda.get_device_properties(device).L2_cache_size // 2
    results = torch.empty(n_bytes, dtype=torch.uint8, device=device)
    with timer.on_stream():
        copied = max(copy.rate.median for copy in copy_ceilings(timer, device))
        seconds = device_seconds(timer, [lambda: results.fill_(1), lambda: results.fill_(2)])
    assert n_bytes / seconds.median < 1.2 * copied
