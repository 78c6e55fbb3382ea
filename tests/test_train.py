"""Whole runs: their files, exact resuming, and equal results over layouts and modes."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from fastllama.training import computation
from tests.runs import losses, rows, train, train_in_child
from tests.workspace import Workspace


def test_files_of_a_run(workspace: Workspace, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(workspace.recipe, "--run-dir", run, "--logging.tensorboard", "true")
    logged = rows(run)
    assert [int(row["step"]) for row in logged] == list(range(1, 11))
    assert abs(float(logged[0]["loss"]) - math.log(320)) < 0.1
    assert float(logged[-1]["loss"]) < float(logged[0]["loss"]) - 0.5
    assert [int(row["tokens_total"]) for row in logged] == [256 * step for step in range(1, 11)]
    assert [int(row["step"]) for row in logged if row["val_loss"]] == [5, 10]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "tensorboard").iterdir())
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [0, 4, 10]
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 10
    (session,) = json.loads((run / "environment.json").read_text())
    assert session["packages"]["torch"]
    assert (run / "checkpoints" / "latest").resolve().name == "step-00000010"
    assert (run / "tokenizer.json").read_bytes() == (workspace.data / "tokenizer.json").read_bytes()
    config = run / "config.toml"
    assert "max_lr = 0.01" in config.read_text()


def test_finished_run_does_not_change(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(workspace.recipe, "--run-dir", run)
    before = (run / "metrics.csv").read_bytes()
    capsys.readouterr()
    train(workspace.recipe, "--run-dir", run)
    assert "has done all of its 10 updates" in " ".join(capsys.readouterr().out.split())
    assert (run / "metrics.csv").read_bytes() == before


def test_same_command_is_bit_identical(workspace: Workspace, tmp_path: Path) -> None:
    for name in ("one", "two"):
        train(workspace.recipe, "--run-dir", tmp_path / name, "--model.dropout", 0.1)
    assert losses(tmp_path / "one") == losses(tmp_path / "two")


def test_killed_run_resumes_bit_identically(workspace: Workspace, tmp_path: Path) -> None:
    options = ["--training.training-tokens", 60 * 256, "--checkpoint.interval-tokens", 20 * 256]
    # With dropout, so that the random numbers of resumed updates are compared too.
    options += ["--model.dropout", 0.1]
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    done = train_in_child(workspace.recipe, "--run-dir", uninterrupted, *options)
    assert done.returncode == 0, done.stderr
    kill = "step == 33 and os.kill(os.getpid(), signal.SIGKILL)"
    done = train_in_child(workspace.recipe, "--run-dir", killed, *options, each_update=kill)
    assert done.returncode == -signal.SIGKILL
    # The row of update 32 would be written after the launch of update 33.
    assert list(losses(killed)) == list(range(1, 32))
    resumed = train_in_child("--resume", killed)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming after update 20 of 60" in resumed.stdout
    assert [int(row["step"]) for row in rows(killed)] == list(range(1, 61))
    assert losses(killed) == losses(uninterrupted)
    superseded = (killed / "superseded-metrics.csv").read_text().splitlines()
    assert [int(line.split(",")[0]) for line in superseded] == list(range(21, 32))


def test_full_disk_keeps_the_last_checkpoint(workspace: Workspace, tmp_path: Path) -> None:
    run = tmp_path / "run"
    # From update 7 on no file may exceed 20 kB: enough for the logs, too little for the weights.
    limit = "import resource; step == 7 and resource.setrlimit(resource.RLIMIT_FSIZE, (20000, -1))"
    done = train_in_child(workspace.recipe, "--run-dir", run, each_update=limit)
    assert done.returncode == 1
    (message,) = (line for line in done.stderr.splitlines() if line.startswith("error:"))
    assert "step-00000010 could not be written" in message
    assert "File too large" in message
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {"latest", "step-00000005"}
    assert train_in_child("--resume", run).returncode == 0
    assert list(losses(run)) == list(range(1, 11))


def test_resume_with_other_micro_batches_and_more_tokens(
    workspace: Workspace, tmp_path: Path
) -> None:
    uninterrupted, resumed = tmp_path / "uninterrupted", tmp_path / "resumed"
    longer = ["--optimizer.schedule", "constant", "--training.training-tokens"]
    train(workspace.recipe, "--run-dir", uninterrupted, *longer, 20 * 256)
    train(workspace.recipe, "--run-dir", resumed, *longer, 10 * 256)
    more = ["--training.training-tokens", 20 * 256, "--training.batch-size", 4]
    train("--resume", resumed, *more)
    expected, found = losses(uninterrupted), losses(resumed)
    assert list(found) == list(range(1, 21))
    for step, loss in expected.items():
        # Other micro-batches sum the same float32 terms in another order.
        assert float(found[step]) == pytest.approx(float(loss), rel=1e-4)


def test_resume_in_another_dtype_is_reported(
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, auto = tmp_path / "run", ["--training.dtype", "auto", "--optimizer.schedule", "constant"]
    for dtype, updates in (("float32", 6), ("bfloat16", 7)):
        monkeypatch.setattr(computation, "faster_dtype", lambda device, dtype=dtype: dtype)
        start = ["--resume", run] if updates > 6 else [workspace.recipe, "--run-dir", run, *auto]
        train(*start, "--training.training-tokens", updates * 256)
    assert capsys.readouterr().err.splitlines() == [
        f'{run}: training.dtype = "auto" is bfloat16 here and was float32 before, so the numbers '
        "will differ slightly; --training.dtype float32 keeps it."
    ]


def test_two_ranks_train_the_same_model(workspace: Workspace, tmp_path: Path) -> None:
    one_rank, two_ranks = tmp_path / "one", tmp_path / "two"
    train(workspace.recipe, "--run-dir", one_rank)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", "-m", "fastllama", "train", str(workspace.recipe)]
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
    # Two runs that learn nothing would agree too.
    assert float(two[10]) < float(two[1]) - 0.5
    for step, loss in one.items():
        # Gradients of two halves are summed in another order: float32 rounding, amplified by 10
        # updates at a learning rate of 1e-2.
        assert float(two[step]) == pytest.approx(float(loss), rel=1e-5)
    for row, other in zip(rows(one_rank), rows(two_ranks), strict=True):
        if row["val_loss"]:
            assert float(other["val_loss"]) == pytest.approx(float(row["val_loss"]), rel=1e-5)
    # One process resumes from the shards of two.
    train("--resume", two_ranks, "--training.training-tokens", 12 * 256)
    assert list(losses(two_ranks)) == list(range(1, 13))


def test_compiled_blocks_train_the_same_model(workspace: Workspace, tmp_path: Path) -> None:
    eager, compiled = tmp_path / "eager", tmp_path / "compiled"
    train(workspace.recipe, "--run-dir", eager)
    # In a child process: torch.compile warns about itself, and pytest makes warnings errors.
    options = ["--run-dir", compiled, "--training.compile", "true"]
    done = train_in_child(workspace.recipe, *options)
    assert done.returncode == 0, done.stderr
    for step, loss in losses(eager).items():
        assert float(losses(compiled)[step]) == pytest.approx(float(loss), rel=1e-4)


def test_bfloat16_compute_keeps_float32_parameters(workspace: Workspace, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(workspace.recipe, "--run-dir", run, "--training.dtype", "bfloat16")
    (shard,) = (run / "checkpoints" / "latest").glob("*.safetensors")
    with safe_open(str(shard), framework="pt") as tensors:
        names = set(tensors.keys())
        dtypes = {tensors.get_slice(name).get_dtype() for name in names}
    assert dtypes == {"F32"}
    assert {"model.embedding.weight", "optimizer.exp_avg.blocks.1.mlp.down.weight"} <= names
    # 15 weights, each with AdamW's two moments and step count.
    assert len(names) == 4 * 15
    assert float(rows(run)[-1]["loss"]) < 5.3
