"""Whole runs with `data.document_mask`."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastllama.inference.evaluate import validation_loss
from fastllama.training import side_jobs
from tests.runs import losses, train, train_in_child
from tests.workspace import Workspace

MASKED = ["--data.document-mask", "true"]
# The schedule must not depend on the length of the run.
OPTIONS = [*MASKED, "--optimizer.schedule", "constant", "--logging.sample-interval", 0]


def test_resumes_bit_identically(
    workspace: Workspace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packings = []

    def record(*arguments: Any) -> tuple[float, float]:
        packings.append(arguments[-1])
        return validation_loss(*arguments)

    monkeypatch.setattr(side_jobs, "validation_loss", record)
    whole, parts, mixed = (tmp_path / name for name in ("whole", "parts", "mixed"))
    train(workspace.recipe, "--run-dir", whole, *OPTIONS, "--training.training-tokens", 8 * 256)
    assert "documents are kept apart; room for 32 in a micro-batch" in capsys.readouterr().out
    train(workspace.recipe, "--run-dir", parts, *OPTIONS, "--training.training-tokens", 6 * 256)
    train("--resume", parts, "--training.training-tokens", 8 * 256)
    assert losses(parts) == losses(whole)
    assert {packing.n_documents for packing in packings} == {32}
    # Some of the 8 sequences in the first update hold two documents.
    one_update = ["--training.training-tokens", 256, "--optimizer.warmup-iterations", 0]
    train(workspace.recipe, "--run-dir", mixed, *one_update, "--logging.sample-interval", 0)
    assert losses(mixed)[1] != losses(whole)[1]


def test_attention_without_packed_documents_is_an_error(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        train(workspace.recipe, "--run-dir", run, *MASKED, "--training.attention", "cudnn")
    assert stop.value.code == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "cudnn was asked for, but it has no kernel for packed documents; use auto" in message
    assert not run.exists()


@pytest.mark.slow
def test_two_ranks_train_the_same_model(workspace: Workspace, tmp_path: Path) -> None:
    one_rank, two_ranks = tmp_path / "one", tmp_path / "two"
    train(workspace.recipe, "--run-dir", one_rank, *MASKED)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", "-m", "fastllama", "train", str(workspace.recipe), *MASKED]
    done = subprocess.run(
        [*command, "--run-dir", str(two_ranks)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    one, two = losses(one_rank), losses(two_ranks)
    assert list(two) == list(one)
    for step, loss in one.items():
        # Other micro-batches sum the same float32 terms in another order.
        assert float(two[step]) == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.slow
def test_compiled_training_makes_no_later_graphs(workspace: Workspace, tmp_path: Path) -> None:
    eager, compiled = tmp_path / "eager", tmp_path / "compiled"
    train(workspace.recipe, "--run-dir", eager, *MASKED)
    # In a child process: torch.compile warns about itself, and pytest makes warnings errors.
    options = ["--run-dir", compiled, "--training.compile", "true", *MASKED]
    done = train_in_child(workspace.recipe, *options, "--training.activation-checkpointing", "full")
    assert done.returncode == 0, done.stderr
    assert "4 graphs compiled" in done.stdout
    assert "more graphs" not in done.stdout
    for step, loss in losses(eager).items():
        assert float(losses(compiled)[step]) == pytest.approx(float(loss), rel=1e-4)
