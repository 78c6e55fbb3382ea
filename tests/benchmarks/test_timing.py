"""The arithmetic of the timers, with clocks that are made up."""

import time
from collections.abc import Callable, Sequence

import pytest
import torch

from benchmarks.ceilings import copy_ceiling
from benchmarks.timing import (
    FEWEST_SAMPLES,
    MOST_SAMPLES,
    Call,
    Timer,
    device_seconds,
    host_seconds,
    make_timer,
)
from tests.compare import DEVICE

FLUSH_SECONDS = 0.25


class PretendedTimer(Timer):
    """A flush takes a quarter of a second, and a call what it returns, without waiting for it."""

    kind = "pretended"

    def __init__(self) -> None:
        self.n_runs = 0

    def series(self, calls: Sequence[Call]) -> Callable[[], float]:
        def run() -> float:
            self.n_runs += 1
            return sum(FLUSH_SECONDS + (call() or 0.0) for call in calls)  # type: ignore[misc]

        return run


def test_flushes_are_subtracted_and_calls_averaged() -> None:
    spread = device_seconds(PretendedTimer(), [lambda: 2.0, lambda: 4.0])
    assert (spread.low, spread.median, spread.high) == pytest.approx((3.0, 3.0, 3.0))


@pytest.mark.parametrize(("seconds", "n"), [(0.0, FEWEST_SAMPLES), (1e9, MOST_SAMPLES)])
def test_samples_by_the_time_there_is(seconds: float, n: int) -> None:
    timer = PretendedTimer()
    assert device_seconds(timer, [lambda: 1.0], seconds).n == n
    # Calls and flushes in turn, once each to warm up, and once to see how long it takes.
    assert timer.n_runs == 2 * n + 3


def test_calls_take_turns() -> None:
    order: list[int] = []
    device_seconds(PretendedTimer(), [lambda: order.append(0), lambda: order.append(1)])
    assert order == [0, 1] * (len(order) // 2)


@pytest.mark.parametrize("waits_for_host", [False, True])
def test_a_call_takes_as_long_as_it_takes(waits_for_host: bool) -> None:
    device = torch.device(DEVICE)
    timer = make_timer(device, waits_for_host=waits_for_host)
    kinds = {"cpu": "host", "cuda": "events" if waits_for_host else "graph"}
    assert timer.kind == kinds[device.type]
    if device.type == "cpu":
        # A sleep is never shorter than asked for, and on a busy machine may be much longer.
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
def test_what_a_call_leaves_to_be_written_back_is_charged_to_it() -> None:
    """Half of a cache of results; written into the cache alone, they would be much faster."""
    device = torch.device("cuda")
    timer = make_timer(device)
    n_bytes = torch.cuda.get_device_properties(device).L2_cache_size // 2
    results = torch.empty(n_bytes, dtype=torch.uint8, device=device)
    with timer.on_stream():
        copied = copy_ceiling(timer, device).rate.median
        seconds = device_seconds(timer, [lambda: results.fill_(1), lambda: results.fill_(2)])
    assert n_bytes / seconds.median < 1.2 * copied
