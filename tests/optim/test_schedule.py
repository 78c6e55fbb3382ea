"""The learning rate of every update, for each schedule."""

import math
from typing import Literal

import pytest

from fastllama.config import OptimizerConfig
from fastllama.optim.schedule import learning_rate

N_UPDATES, WARMUP, MAX_LR, MIN_LR = 100, 10, 1e-2, 1e-3
Schedule = Literal["cosine", "linear", "wsd", "constant"]


def rates(schedule: Schedule, warmup: int = WARMUP, n_updates: int = N_UPDATES) -> list[float]:
    """The learning rate of update i at index i. Updates count from 1, so index 0 is unused."""
    config = OptimizerConfig(
        max_lr=MAX_LR, min_lr=MIN_LR, schedule=schedule, warmup_iterations=warmup
    )
    return [learning_rate(step, n_updates, config) for step in range(n_updates + 1)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_warmup_is_linear(schedule: Schedule) -> None:
    expected = [MAX_LR * step / WARMUP for step in range(WARMUP + 1)]
    assert rates(schedule)[: WARMUP + 1] == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_starts_at_max_lr_without_warmup(schedule: Schedule) -> None:
    assert rates(schedule, warmup=0)[1] == MAX_LR


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_decays_to_min_lr_at_the_last_update(schedule: Schedule) -> None:
    decay = rates(schedule)[WARMUP:]
    assert decay == sorted(decay, reverse=True)
    assert decay[-1] == pytest.approx(MIN_LR, rel=1e-14)
    assert decay[-2] > decay[-1]


def test_shapes_of_the_decay() -> None:
    # 1/4, 1/2 and 3/4 of the way from update 10 to update 90.
    steps = [30, 50, 70]
    fractions: dict[Schedule, list[float]] = {
        "cosine": [(1 + math.cos(math.pi * x)) / 2 for x in (0.25, 0.5, 0.75)],
        "linear": [0.75, 0.5, 0.25],
        "constant": [1.0, 1.0, 1.0],
    }
    for schedule, remaining in fractions.items():
        expected = [MIN_LR + fraction * (MAX_LR - MIN_LR) for fraction in remaining]
        values = rates(schedule, n_updates=90)
        assert [values[step] for step in steps] == pytest.approx(expected, rel=1e-14)


def test_wsd_holds_then_decays_linearly() -> None:
    values = rates("wsd")
    # decay_fraction is 0.2 by default: the last 20 of 100 updates.
    assert values[WARMUP:81] == [MAX_LR] * 71
    expected = [MAX_LR - (MAX_LR - MIN_LR) * i / 20 for i in range(1, 21)]
    assert values[81:] == pytest.approx(expected)


def test_wsd_does_not_decay_during_warmup() -> None:
    values = rates("wsd", warmup=95)
    assert max(values) == values[95] == MAX_LR
    assert values[-1] == pytest.approx(MIN_LR)


def test_stays_at_min_lr_after_the_last_update() -> None:
    config = OptimizerConfig(max_lr=MAX_LR, min_lr=MIN_LR)
    assert learning_rate(N_UPDATES + 50, N_UPDATES, config) == pytest.approx(MIN_LR)
