"""The statistics updates are judged by, against those of numpy and by what they let through."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastllama.train as trainer
from fastllama.cli import main
from fastllama.config import OptimizerConfig
from fastllama.optim.adamw import build_optimizer
from fastllama.optim.clipping import update
from fastllama.optim.spikes import WARM_UP, WINDOW, SpikeDetector
from tests.workspace import Workspace

CPU = torch.device("cpu")


def observe(detector: SpikeDetector, loss: float, norm: float) -> list[bool]:
    found: list[bool] = detector.observe(torch.tensor(loss), torch.tensor(norm)).tolist()
    return found


def settled(n: int = WINDOW, z_score: float = 6.0) -> tuple[SpikeDetector, np.ndarray]:
    """A detector that has seen losses around 2 and norms around 0.5, and those values."""
    values = np.random.default_rng(0).normal([2.0, 0.5], [0.1, 0.05], (n, 2))
    detector = SpikeDetector(z_score, CPU)
    for loss, norm in values:
        assert observe(detector, loss, norm) == [False, False]
    return detector, values


def test_the_first_statistics_are_those_of_all_values() -> None:
    detector, values = settled()
    n, *moments = detector.state.tolist()
    assert n == WINDOW
    # Sums of 128 float32 terms.
    assert moments == pytest.approx([*values.mean(0), *values.var(0)], rel=1e-4)


def test_later_statistics_forget() -> None:
    detector, _ = settled()
    for _ in range(20 * WINDOW):
        observe(detector, 1.0, 0.25)
    assert detector.state[1:].tolist() == pytest.approx([1.0, 0.25, 0.0, 0.0], abs=1e-6)


def test_spikes_are_above_the_mean_and_not_below() -> None:
    for high, expected in (((2.5, 0.5), [False, False]), ((2.9, 0.5), [True, False])):
        assert observe(settled()[0], *high) == expected
    assert observe(settled()[0], 2.0, 0.9) == [False, True]
    assert observe(settled()[0], 0.1, 0.01) == [False, False]


def test_nothing_is_a_spike_before_the_spread_is_known() -> None:
    assert observe(settled(WARM_UP - 1)[0], 100.0, 100.0) == [False, False]
    assert observe(settled(WARM_UP)[0], 100.0, 100.0) == [True, True]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nothing_is_learnt_from_what_is_not_finite(bad: float) -> None:
    detector, _ = settled()
    before = detector.state.clone()
    assert observe(detector, bad, 100.0) == observe(detector, 2.0, bad) == [False, False]
    assert torch.equal(detector.state, before)


def test_a_spike_hides_none_after_it_and_a_new_level_is_accepted() -> None:
    detector, _ = settled()
    assert observe(detector, 1e6, 0.5) == [True, False]
    assert observe(detector, 4.0, 0.5) == [True, False]
    refused = 0
    while observe(detector, 4.0, 0.5)[0]:
        refused += 1
    assert 2 <= refused <= 30


@pytest.mark.parametrize(
    ("loss", "scale", "refusal"), [(2.0, 1.0, 0), (5.0, 1.0, 3), (2.0, 100.0, 2)]
)
def test_an_update_with_a_spike_leaves_no_trace(loss: float, scale: float, refusal: int) -> None:
    parameter = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = build_optimizer(torch.nn.ParameterList([parameter]), OptimizerConfig())
    parameter.grad = torch.full((4, 4), 0.125 * scale)
    _, refused = update(optimizer, torch.tensor(loss), 1.0, settled()[0])
    assert refused == refusal
    assert torch.equal(parameter, torch.ones(4, 4)) == bool(refusal)
    assert optimizer.state[parameter]["step"] == (0 if refusal else 1)


def test_a_spike_is_refused_and_the_statistics_outlive_the_process(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, step = trainer.update, 0

    def update(optimizer: torch.optim.Optimizer, *rest: Any) -> Any:
        nonlocal step
        step += 1
        if step == 120:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad *= 1e4
        return real(optimizer, *rest)

    monkeypatch.setattr(trainer, "update", update)

    def train(start: list[str], updates: int) -> None:
        options = ["--training.spike-z-score", "30", "--optimizer.schedule", "constant"]
        options += ["--logging.sample-interval", "0", "--training.eval-interval", "0"]
        main(["train", *start, *options, "--training.training-tokens", str(updates * 256)])

    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    train([str(workspace.recipe), "--run-dir", str(straight)], 130)
    step = 0
    train([str(workspace.recipe), "--run-dir", str(resumed)], 110)
    train(["--resume", str(resumed)], 130)
    ends = []
    for run in (straight, resumed):
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        progress = json.loads((run / "checkpoints/latest/progress.json").read_text())["progress"]
        ends.append(([row["loss"] for row in rows], progress))
        assert [row["skipped_steps"] for row in rows] == [0] * 119 + [1] * 11
        (bad,) = map(json.loads, (run / "bad-updates.jsonl").read_text().splitlines())
        assert bad["reason"] == "the gradient norm is a spike"
        assert bad["step"] == 120
        assert bad["grad_norm"] > 1000
    assert ends[0] == ends[1]
