"""The clock of the host. tests/training/test_monitor.py tests the clock of a device."""

import contextlib
import time

import pytest

from fastllama.logs.clocks import Clock


def test_side_jobs_are_excluded_even_if_they_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock = Clock()
    now = 110.0
    with clock.side_job():
        now = 115.0
    with contextlib.suppress(OSError), clock.side_job():
        now = 116.0
        raise OSError("the disk is full")
    now = 120.0
    assert (clock.wall(), clock.training()) == (20.0, 14.0)
