"""`training.deterministic`: its settings, its errors, and that it ends with the run."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch._inductor import config as inductor

import fastllama.train as trainer
import fastllama.training.setup as setup
from tests.runs import train
from tests.workspace import Workspace

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def train_deterministic(workspace: Workspace, run: Path, *options: str) -> None:
    # With dropout, so that random numbers are compared too.
    options = ("--training.deterministic", "true", "--model.dropout", "0.1", *options)
    train(workspace.recipe, "--run-dir", run, *options)


def modes() -> tuple[bool, bool, bool, bool]:
    """The deterministic modes of PyTorch, cuDNN and Inductor; whether new tensors are filled."""
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.deterministic,
        inductor.deterministic,
        torch.utils.deterministic.fill_uninitialized_memory,
    )


def test_runs_are_bit_identical(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Set first, so that monkeypatch removes the value that training sets.
    monkeypatch.setenv(WORKSPACE, ":16:8")
    monkeypatch.delenv(WORKSPACE)
    real, during = trainer.update, set()

    def update(*args: Any) -> Any:
        during.add(modes())
        return real(*args)

    monkeypatch.setattr(trainer, "update", update)
    before = modes()
    for name in ("one", "two"):
        train_deterministic(workspace, tmp_path / name)
    assert during == {(True, True, True, False)}
    assert modes() == before == (False, False, False, True)
    assert os.environ[WORKSPACE] == ":4096:8"
    one, two = (
        load_file(path)
        for name in ("one", "two")
        for path in (tmp_path / name).glob("checkpoints/latest/*.safetensors")
    )
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_error_names_nondeterministic_operator(
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(WORKSPACE, ":4096:8")
    real = setup.choose_operators

    def choose(*args: Any) -> Any:
        operators, reason = real(*args)

        def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
            # Two values for one element: PyTorch does not promise which one stays.
            torch.zeros(2).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
            out: Tensor = operators.attention(q, k, v, **options)
            return out

        return dataclasses.replace(operators, attention=attention), reason

    monkeypatch.setattr(setup, "choose_operators", choose)
    with pytest.raises(SystemExit) as stop:
        train_deterministic(workspace, tmp_path / "run")
    assert stop.value.code == 1
    message = capsys.readouterr().err
    assert "The operator put_ has no deterministic implementation on this device" in message
    assert "--training.deterministic false" in message
    assert modes() == (False, False, False, True)


def test_nondeterministic_cublas_workspace_is_an_error(
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(WORKSPACE, ":0:0")
    with pytest.raises(SystemExit) as stop:
        train_deterministic(workspace, tmp_path / "run")
    assert stop.value.code == 2
    assert "CUBLAS_WORKSPACE_CONFIG = :0:0 in the environment" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
