"""Which operators a run trains with, and that Triton kernels train the same model."""

import dataclasses
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from triton import knobs

from fastllama.config import Config, ModelConfig, TrainingConfig
from fastllama.model import operator_choice
from fastllama.model.operator_choice import build_operators, choose_attention_backend
from fastllama_kernels import CPU, TRITON_SAVING
from fastllama_kernels.attention_backends import BACKENDS
from tests.runs import losses, train
from tests.workspace import Workspace

# One micro-batch per update, and no side jobs: Triton's interpreter is slow.
FOUR_UPDATES = (
    *("--training.tokens-per-update", "64", "--training.training-tokens", "256"),
    *("--training.eval-interval", "0", "--logging.sample-interval", "0"),
    *("--optimizer.warmup-iterations", "2"),
)

ON_CPU, ON_CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize("device", [ON_CUDA, ON_CPU], ids=str)
def test_projection_inputs_are_saved_by_triton_kernels(device: torch.device) -> None:
    config = Config(training=TrainingConfig(save_projection_inputs=True))
    operators = build_operators(config, device, "reference")
    # The others recompute nothing.
    expected = TRITON_SAVING if device == ON_CUDA else CPU
    assert operators == dataclasses.replace(expected, attention=operators.attention)


@pytest.mark.parametrize(
    ("kernels", "device", "compiles", "expected"),
    [
        ("auto", ON_CUDA, True, "triton"),
        ("auto", ON_CPU, True, "cpu"),
        ("auto", ON_CPU, False, "reference"),
        ("reference", ON_CUDA, True, "reference"),
        ("reference", ON_CPU, True, "reference"),
        ("cpu", ON_CPU, False, "cpu"),
    ],
)
def test_operators_by_device(
    kernels: Any, device: torch.device, compiles: bool, expected: str
) -> None:
    config = Config(training=TrainingConfig(kernels=kernels, compile=compiles))
    assert build_operators(config, device, "reference").name == expected


@pytest.mark.parametrize(
    ("compiles", "max_seq_len", "expected"),
    [(True, 1024, "matmul"), (True, 1025, "reference"), (False, 1024, "reference")],
)
def test_attention_on_a_cpu(compiles: bool, max_seq_len: int, expected: str) -> None:
    config = Config(
        model=ModelConfig(max_seq_len=max_seq_len), training=TrainingConfig(compile=compiles)
    )
    assert choose_attention_backend(config, ON_CPU).name == expected


def test_packed_documents_belong_to_the_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    monkeypatch.setattr(
        operator_choice, "choose_attention", lambda shape, wanted: shapes.append(shape)
    )
    config = Config(training=TrainingConfig(compile=False))
    for n_documents in (None, 64):
        choose_attention_backend(config, ON_CPU, n_documents)
    assert [shape.n_documents for shape in shapes] == [None, 64]


def test_attention_option_lists_every_backend() -> None:
    choices = get_args(get_type_hints(TrainingConfig)["attention"])
    assert list(choices) == ["auto", *(backend.name for backend in BACKENDS)]


def test_triton_without_a_gpu_is_an_error(
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


def test_unsupported_attention_backend_is_an_error(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        train(workspace.recipe, "--run-dir", run, "--training.attention", "flash-attn-2")
    assert stop.value.code == 2
    assert "flash-attn-2 was asked for, but" in capsys.readouterr().err
    assert not run.exists()


def test_console_reports_kernels_and_attention(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(workspace.recipe, "--run-dir", tmp_path / "run", *FOUR_UPDATES)
    assert "kernels reference; attention reference: the only one" in capsys.readouterr().out


@pytest.mark.slow  # Interprets kernels of a training.
@pytest.mark.skipif(not knobs.runtime.interpret, reason="needs Triton's interpreter")
def test_triton_trains_the_same_model(workspace: Workspace, tmp_path: Path) -> None:
    for kernels in ("triton", "reference"):
        options = (*FOUR_UPDATES, "--training.kernels", kernels)
        train(workspace.recipe, "--run-dir", tmp_path / kernels, *options)
    found, expected = losses(tmp_path / "triton"), losses(tmp_path / "reference")
    assert len(expected) == 4
    for step, loss in expected.items():
        # float32 has about 7 digits; after four updates the last one differs.
        assert float(found[step]) == pytest.approx(float(loss), rel=2e-6)
