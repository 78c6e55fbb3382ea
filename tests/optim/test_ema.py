"""The average of the weights: its formula, in checkpoints, on resume, and in generation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from fastllama.checkpoints.state import model_tensors
from fastllama.cli import main
from fastllama.inference import load
from fastllama.optim.ema import WeightAverage
from tests.runs import train
from tests.workspace import Workspace

STEP_5, STEP_10 = "step-00000005", "step-00000010"
EMA = ["--training.ema-decay", 0.5]


def tensors(run: Path, step: str, prefix: str) -> dict[str, torch.Tensor]:
    """Tensors of a checkpoint by their names after `prefix`."""
    found = {}
    for shard in (run / "checkpoints" / step).glob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if name.startswith(prefix):
                    found[name.removeprefix(prefix)] = file.get_tensor(name)
    return found


def test_average_follows_the_formula() -> None:
    model = nn.Linear(3, 2)
    average = WeightAverage(model, decay=0.3)
    expected = {name: weight.detach().double() for name, weight in model.named_parameters()}
    for step in range(1, 9):
        for weight in model.parameters():
            weight.data += torch.randn_like(weight)
        average.update(step)
        # (1 + step) / (10 + step) is below 0.3 until the third update.
        decay = min(0.3, (1 + step) / (10 + step))
        for name, weight in model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * weight.detach().double()
            torch.testing.assert_close(average.tensors[name].double(), expected[name])
        assert (decay == 0.3) == (step >= 3)


def test_average_is_saved_and_resumed(workspace: Workspace, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(workspace.recipe, "--run-dir", whole, *EMA)
    # The average changes no weight.
    train(workspace.recipe, "--run-dir", parts)
    weights, average = (tensors(whole, STEP_10, prefix) for prefix in ("model.", "ema."))
    assert weights.keys() == average.keys()
    for name, weight in tensors(parts, STEP_10, "model.").items():
        assert torch.equal(weight, weights[name])
        assert not torch.equal(weight, average[name])
    train("--resume", whole / "checkpoints" / STEP_5)
    for name, value in tensors(whole, STEP_10, "ema.").items():
        assert torch.equal(value, average[name])


def test_average_begins_where_it_is_switched_on(workspace: Workspace, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(workspace.recipe, "--run-dir", run)
    train("--resume", run, *EMA, "--training.training-tokens", 11 * 256)
    before, after = (tensors(run, step, "model.") for step in (STEP_10, "step-00000011"))
    for name, value in tensors(run, "step-00000011", "ema.").items():
        torch.testing.assert_close(value, 0.5 * before[name] + 0.5 * after[name])
    # Switched off, it is neither loaded nor saved.
    train("--resume", run, "--training.ema-decay", 0, "--training.training-tokens", 12 * 256)
    assert not tensors(run, "step-00000012", "ema.")


def test_generation_with_either(
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, loaded, original = tmp_path / "run", [], load.load_run
    train(workspace.recipe, "--run-dir", run, *EMA)

    def load_run(*arguments: Any) -> Any:
        found = original(*arguments)
        # `generate` packs them.
        loaded.append({name: w.clone() for name, w in model_tensors(found.model, "").items()})
        return found

    monkeypatch.setattr(load, "load_run", load_run)
    for flags, prefix, dtype in (
        (["--dtype", "float32"], "model.", torch.float32),
        (["--ema", "--dtype", "bfloat16"], "ema.", torch.bfloat16),
    ):
        main(["generate", str(run), "--prompt", "a", *flags])
        saved = tensors(run, STEP_10, prefix)
        for name, weight in loaded[-1].items():
            assert torch.equal(weight, saved[name].to(dtype))
    train("--resume", run, "--training.ema-decay", 0, "--training.training-tokens", 11 * 256)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["generate", str(run), "--prompt", "a", "--ema"])
    assert stop.value.code == 2
    assert "step-00000011 has no average of the weights; leave out --ema" in capsys.readouterr().err
