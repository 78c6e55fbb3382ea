"""Spike detection: statistics against NumPy's, decisions, and a run that resumes."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastllama.train as trainer
from fastllama.config import OptimizerConfig
from fastllama.optim.adamw import build_optimizer
from fastllama.optim.clipping import update
from fastllama.optim.spikes import WARM_UP, WINDOW, SpikeDetector
from tests.runs import train
from tests.workspace import Workspace


def observe(detector: SpikeDetector, loss: float, norm: float) -> list[bool]:
    spikes: list[bool] = detector.observe(torch.tensor(loss), torch.tensor(norm)).tolist()
    return spikes


def warmed_up(n: int = WINDOW, z_score: float = 6.0) -> tuple[SpikeDetector, np.ndarray]:
    """A detector after `n` losses near 2 and norms near 0.5, and these values, (n, 2)."""
    values = np.random.default_rng(0).normal([2.0, 0.5], [0.1, 0.05], (n, 2))
    detector = SpikeDetector(z_score, torch.device("cpu"))
    for loss, norm in values:
        assert observe(detector, loss, norm) == [False, False]
    return detector, values


def test_first_window_has_exact_statistics() -> None:
    detector, values = warmed_up()
    n, *moments = detector.state.tolist()
    assert n == WINDOW
    # Sums of 128 float32 terms.
    assert moments == pytest.approx([*values.mean(0), *values.var(0)], rel=1e-4)


def test_old_values_are_forgotten() -> None:
    detector, _ = warmed_up()
    for _ in range(20 * WINDOW):
        observe(detector, 1.0, 0.25)
    assert detector.state[1:].tolist() == pytest.approx([1.0, 0.25, 0.0, 0.0], abs=1e-6)


@pytest.mark.parametrize(
    ("loss", "norm", "spikes"),
    [
        (2.5, 0.5, [False, False]),
        (2.9, 0.5, [True, False]),
        (2.0, 0.9, [False, True]),
        # Far below the mean is no spike.
        (0.1, 0.01, [False, False]),
    ],
)
def test_spikes_are_far_above_the_mean(loss: float, norm: float, spikes: Sequence[bool]) -> None:
    assert observe(warmed_up()[0], loss, norm) == spikes


def test_no_spikes_during_warm_up() -> None:
    assert observe(warmed_up(WARM_UP - 1)[0], 100.0, 100.0) == [False, False]
    assert observe(warmed_up(WARM_UP)[0], 100.0, 100.0) == [True, True]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_values_change_no_statistics(bad: float) -> None:
    detector, _ = warmed_up()
    before = detector.state.clone()
    assert observe(detector, bad, 100.0) == observe(detector, 2.0, bad) == [False, False]
    assert torch.equal(detector.state, before)


def test_limit_after_one_spike_and_after_a_higher_level() -> None:
    detector, _ = warmed_up()
    # A huge spike does not hide a small one after it.
    assert observe(detector, 1e6, 0.5) == [True, False]
    assert observe(detector, 4.0, 0.5) == [True, False]
    # A loss that stays at 4 is accepted in the end.
    n_spikes = 0
    while observe(detector, 4.0, 0.5)[0]:
        n_spikes += 1
    assert 2 <= n_spikes <= 30


@pytest.mark.parametrize(
    ("loss", "scale", "reason"), [(2.0, 1.0, 0), (5.0, 1.0, 3), (2.0, 100.0, 2)]
)
def test_update_with_a_spike_is_skipped(loss: float, scale: float, reason: int) -> None:
    parameter = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = build_optimizer(torch.nn.ParameterList([parameter]), OptimizerConfig())
    parameter.grad = torch.full((4, 4), 0.125 * scale)
    _, skipped = update(optimizer, torch.tensor(loss), 1.0, warmed_up()[0])
    assert skipped == reason
    assert torch.equal(parameter, torch.ones(4, 4)) == bool(reason)
    assert optimizer.state[parameter]["step"] == (0 if reason else 1)


@pytest.mark.slow
def test_statistics_survive_resuming(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, step = trainer.update, 0

    def update_with_spike(optimizer: torch.optim.Optimizer, *rest: Any) -> Any:
        nonlocal step
        step += 1
        if step == 120:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad *= 1e4
        return original(optimizer, *rest)

    monkeypatch.setattr(trainer, "update", update_with_spike)
    options = ["--training.spike-z-score", 30, "--optimizer.schedule", "constant"]
    options += ["--logging.sample-interval", 0, "--training.eval-interval", 0]

    def train_until(n_updates: int, *start: object) -> None:
        train(*start, *options, "--training.training-tokens", n_updates * 256)

    uninterrupted, resumed = tmp_path / "uninterrupted", tmp_path / "resumed"
    train_until(130, workspace.recipe, "--run-dir", uninterrupted)
    step = 0
    train_until(110, workspace.recipe, "--run-dir", resumed)
    train_until(130, "--resume", resumed)
    results = []
    for run in (uninterrupted, resumed):
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        progress = json.loads((run / "checkpoints/latest/progress.json").read_text())["progress"]
        results.append(([row["loss"] for row in rows], progress))
        assert [row["skipped_steps"] for row in rows] == [0] * 119 + [1] * 11
        (bad,) = map(json.loads, (run / "bad-updates.jsonl").read_text().splitlines())
        assert bad["reason"] == "the gradient norm is a spike"
        assert bad["step"] == 120
        assert bad["grad_norm"] > 1000
    assert results[0] == results[1]
