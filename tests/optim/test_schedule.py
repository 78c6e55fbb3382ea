import math
from typing import Literal

import pytest

from fastllama.config import OptimizerConfig
from fastllama.optim.schedule import learning_rate

N, WARMUP, TOP, LOW = 100, 10, 1e-2, 1e-3
Schedule = Literal["cosine", "linear", "wsd", "constant"]


def rates(schedule: Schedule, warmup: int = WARMUP, n_updates: int = N) -> list[float]:
    """The rate of update i at index i; index 0 is no update."""
    config = OptimizerConfig(max_lr=TOP, min_lr=LOW, schedule=schedule, warmup_iterations=warmup)
    return [learning_rate(step, n_updates, config) for step in range(n_updates + 1)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_warms_up_along_a_line(schedule: Schedule) -> None:
    wanted = [TOP * step / WARMUP for step in range(WARMUP + 1)]
    assert rates(schedule)[: WARMUP + 1] == pytest.approx(wanted, rel=1e-15)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_without_warmup_starts_at_the_top(schedule: Schedule) -> None:
    assert rates(schedule, warmup=0)[1] == TOP


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_falls_to_the_minimum_at_the_last_update(schedule: Schedule) -> None:
    decay = rates(schedule)[WARMUP:]
    assert decay == sorted(decay, reverse=True)
    assert decay[-1] == pytest.approx(LOW, rel=1e-14)
    assert decay[-2] > decay[-1]


def test_shapes_of_the_decay() -> None:
    # A quarter, half and three quarters of the way from update 10 to update 90.
    at = [30, 50, 70]
    shares: dict[Schedule, list[float]] = {
        "cosine": [(1 + math.cos(math.pi * x)) / 2 for x in (0.25, 0.5, 0.75)],
        "linear": [0.75, 0.5, 0.25],
        "constant": [1.0, 1.0, 1.0],
    }
    for schedule, left in shares.items():
        wanted = [LOW + share * (TOP - LOW) for share in left]
        values = rates(schedule, n_updates=90)
        assert [values[step] for step in at] == pytest.approx(wanted, rel=1e-14)


def test_wsd_holds_then_decays_along_a_line() -> None:
    values = rates("wsd")
    # decay_fraction is 0.2 by default: the last 20 of 100 updates.
    assert values[WARMUP:81] == [TOP] * 71
    assert values[81:] == pytest.approx([TOP - (TOP - LOW) * i / 20 for i in range(1, 21)])


def test_wsd_does_not_decay_before_the_top() -> None:
    values = rates("wsd", warmup=95)
    assert max(values) == values[95] == TOP
    assert values[-1] == pytest.approx(LOW)


def test_is_within_its_bounds_past_the_end() -> None:
    config = OptimizerConfig(max_lr=TOP, min_lr=LOW)
    assert learning_rate(N + 50, N, config) == pytest.approx(LOW)
