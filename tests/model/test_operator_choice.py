"""Which operators a run trains with, and that training through the kernels learns the same."""

from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from triton import knobs

from fastllama.config import TrainingConfig
from fastllama.model.operator_choice import uses_triton
from fastllama_kernels.attention_backends import BACKENDS
from tests.test_train import losses, train
from tests.workspace import Workspace

# Of one micro-batch each, and nothing besides: the interpreter takes a program at a time.
FOUR_UPDATES = (
    *("--training.tokens-per-update", "64", "--training.training-tokens", "256"),
    *("--training.eval-interval", "0", "--logging.sample-interval", "0"),
    *("--optimizer.warmup-iterations", "2"),
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_auto_takes_the_kernels_where_they_run() -> None:
    assert uses_triton("auto", CUDA)
    assert not uses_triton("auto", CPU)
    assert not uses_triton("reference", CUDA)


def test_the_option_offers_every_backend() -> None:
    offered = get_args(get_type_hints(TrainingConfig)["attention"])
    assert list(offered) == ["auto", *(backend.name for backend in BACKENDS)]


def test_kernels_without_a_gpu_are_refused(
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        train(workspace.recipe, "--run-dir", run, "--training.kernels", "triton")
    assert stop.value.code == 2
    assert "needs a CUDA device, and training is on cpu" in capsys.readouterr().err
    assert not run.exists()


def test_a_backend_that_cannot_run_is_refused(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        train(workspace.recipe, "--run-dir", run, "--training.attention", "flash-attn-2")
    assert stop.value.code == 2
    assert "flash-attn-2 was asked for, but" in capsys.readouterr().err
    assert not run.exists()


def test_a_run_says_what_it_runs_on(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(workspace.recipe, "--run-dir", tmp_path / "run", *FOUR_UPDATES)
    assert "kernels reference; attention reference: the only one" in capsys.readouterr().out


@pytest.mark.skipif(not knobs.runtime.interpret, reason="the CPU runs kernels if interpreted")
def test_training_through_the_kernels_learns_the_same(workspace: Workspace, tmp_path: Path) -> None:
    for kernels in ("triton", "reference"):
        options = (*FOUR_UPDATES, "--training.kernels", kernels)
        train(workspace.recipe, "--run-dir", tmp_path / kernels, *options)
    through_kernels, plain = losses(tmp_path / "triton"), losses(tmp_path / "reference")
    assert len(plain) == 4
    for step, loss in plain.items():
        # Written with 7 digits or so; four updates in float32 differ in the last of them.
        assert float(through_kernels[step]) == pytest.approx(float(loss), rel=2e-6)
