"""The loop: what a run writes, that it resumes exactly, and what it does with bad updates."""

import csv
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fastllama.train as trainer
import fastllama.training.setup as setup
from fastllama.atomic import locked
from fastllama.cli import main
from fastllama.config import load_recipe
from fastllama.data.dataset import open_dataset
from fastllama.data.prepare import prepare
from fastllama.logs.rows import COLUMNS
from tests.workspace import Workspace

# Runs the command with `fastllama.train.update` replaced by one that first calls `interfere` with
# the number of the update under way, after its forward and backward passes.
INTERFERENCE = """
import os, signal, sys
import fastllama.train
from fastllama.cli import main

original, step = fastllama.train.update, int(sys.argv[1])
def update(optimizer, loss, *rest):
    global step
    step += 1
    {interfere}
    return original(optimizer, loss, *rest)
fastllama.train.update = update
main(sys.argv[2:])
"""


def train(*args: str | Path) -> None:
    main(["train", *map(str, args)])


def train_with(interfere: str, done: int, *args: str | Path) -> subprocess.CompletedProcess[str]:
    """Train in a process of its own, after `done` updates, with a line of code in each update."""
    code = INTERFERENCE.format(interfere=interfere)
    return subprocess.run(
        [sys.executable, "-c", code, str(done), "train", *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def rows(run: Path) -> list[dict[str, str]]:
    with open(run / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def losses(run: Path) -> dict[int, str]:
    return {int(row["step"]): row["loss"] for row in rows(run)}


def test_run_writes_its_folder(workspace: Workspace, tmp_path: Path) -> None:
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


def test_finished_run_is_left_alone(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(workspace.recipe, "--run-dir", run)
    before = (run / "metrics.csv").read_bytes()
    capsys.readouterr()
    train(workspace.recipe, "--run-dir", run)
    assert "has done all of its 10 updates" in " ".join(capsys.readouterr().out.split())
    assert (run / "metrics.csv").read_bytes() == before


def test_a_link_that_a_kill_left_behind_is_mended(workspace: Workspace, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(workspace.recipe, "--run-dir", run)
    latest = run / "checkpoints" / "latest"
    latest.unlink()
    # As after a kill between the last checkpoint's rename and its link.
    latest.symlink_to("step-00000005")
    train(workspace.recipe, "--run-dir", run)
    assert latest.resolve().name == "step-00000010"


def test_same_command_is_bit_identical(workspace: Workspace, tmp_path: Path) -> None:
    for name in ("one", "two"):
        train(workspace.recipe, "--run-dir", tmp_path / name, "--model.dropout", "0.1")
    assert losses(tmp_path / "one") == losses(tmp_path / "two")


def test_killed_run_resumes_bit_identically(workspace: Workspace, tmp_path: Path) -> None:
    options = ["--training.training-tokens", 60 * 256, "--checkpoint.interval-tokens", 20 * 256]
    # Dropout, so that the random numbers of resumed updates are compared as well.
    options += ["--model.dropout", 0.1]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert train_with("", 0, workspace.recipe, "--run-dir", straight, *options).returncode == 0
    kill = "step == 33 and os.kill(os.getpid(), signal.SIGKILL)"
    done = train_with(kill, 0, workspace.recipe, "--run-dir", killed, *options)
    assert done.returncode == -signal.SIGKILL
    # The row of update 32 is written while update 33 runs, after this moment in it.
    assert list(losses(killed)) == list(range(1, 32))
    resumed = train_with("", 20, "--resume", killed)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming after update 20 of 60" in resumed.stdout
    assert [int(row["step"]) for row in rows(killed)] == list(range(1, 61))
    assert losses(killed) == losses(straight)
    superseded = (killed / "superseded-metrics.csv").read_text().splitlines()
    assert [int(line.split(",")[0]) for line in superseded] == list(range(21, 32))


def test_bad_update_is_skipped_and_counted(workspace: Workspace, tmp_path: Path) -> None:
    run = tmp_path / "run"
    poison = "loss = loss * float('nan') if step == 4 else loss"
    done = train_with(poison, 0, workspace.recipe, "--run-dir", run)
    assert done.returncode == 0, done.stderr
    assert "positions 24 to 31 of the data order" in " ".join(done.stdout.split())
    assert [row["skipped_steps"] for row in rows(run)] == ["0"] * 3 + ["1"] * 7
    assert all(math.isfinite(float(row["loss"])) for row in rows(run))


def test_bad_updates_in_a_row_end_the_run(workspace: Workspace, tmp_path: Path) -> None:
    run = tmp_path / "run"
    poison = "loss = loss * float('inf') if step > 5 else loss"
    options = ["--training.max-bad-updates", 3]
    done = train_with(poison, 0, workspace.recipe, "--run-dir", run, *options)
    assert done.returncode == 1
    assert "The last 3 updates were all skipped" in done.stderr
    assert "positions 56 to 63 of the data order" in done.stderr
    assert "The weights are those of update 5" in done.stderr
    assert "Traceback" not in done.stderr
    assert (run / "checkpoints" / "latest").resolve().name == "step-00000005"


def test_full_disk_keeps_the_last_checkpoint(workspace: Workspace, tmp_path: Path) -> None:
    run = tmp_path / "run"
    # From update 7 on no file may exceed 20 kB: enough for the logs, not for the weights.
    limit = "import resource; step == 7 and resource.setrlimit(resource.RLIMIT_FSIZE, (20000, -1))"
    done = train_with(limit, 0, workspace.recipe, "--run-dir", run)
    assert done.returncode == 1
    (message,) = (line for line in done.stderr.splitlines() if line.startswith("error:"))
    assert "step-00000010 could not be written" in message
    assert "File too large" in message
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {"latest", "step-00000005"}
    assert train_with("", 5, "--resume", run).returncode == 0
    assert list(losses(run)) == list(range(1, 11))


def test_compile_without_a_compiler_is_refused(
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SystemExit) as stop:
        train(workspace.recipe, "--run-dir", tmp_path / "run", "--training.compile", "true")
    assert stop.value.code == 2
    assert "no-such-compiler" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_other_options_do_not_take_over_a_run(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(workspace.recipe, "--run-dir", run)
    before = (run / "config.toml").read_bytes()
    with pytest.raises(SystemExit) as stop:
        train(workspace.recipe, "--run-dir", run, "--optimizer.max-lr", "0.02")
    assert stop.value.code == 2
    assert "optimizer.max_lr = 0.01, not 0.02" in capsys.readouterr().err
    assert (run / "config.toml").read_bytes() == before


def test_resume_accepts_other_micro_batches_and_more_tokens(
    workspace: Workspace, tmp_path: Path
) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    longer = ["--optimizer.schedule", "constant", "--training.training-tokens"]
    train(workspace.recipe, "--run-dir", straight, *longer, 20 * 256)
    train(workspace.recipe, "--run-dir", resumed, *longer, 10 * 256)
    more = ["--training.training-tokens", 20 * 256, "--training.batch-size", 4]
    train("--resume", resumed, *more)
    one, other = losses(straight), losses(resumed)
    assert list(other) == list(range(1, 21))
    for step, loss in one.items():
        # Another micro-batch sums the same float32 terms in another order.
        assert float(other[step]) == pytest.approx(float(loss), rel=1e-4)


def test_resume_refuses_another_model_and_other_data(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(workspace.recipe, "--run-dir", run)
    more = ["--training.training-tokens", "5120"]
    changes = {
        "--model.theta": "500000",
        "--training.seed": "7",
        "--training.tokens-per-update": "512",
    }
    for option, value in changes.items():
        with pytest.raises(SystemExit) as stop:
            train("--resume", run, option, value, *more)
        assert stop.value.code == 2
        assert f"with {option[2:].replace('-', '_')} = " in capsys.readouterr().err


def test_two_processes_do_not_share_a_run(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with locked(run), pytest.raises(SystemExit) as stop:
        train(workspace.recipe, "--run-dir", run)
    assert stop.value.code == 2
    assert "another process is writing into" in capsys.readouterr().err
    assert [path.name for path in run.iterdir()] == [".lock"]


def test_a_run_is_not_touched_while_another_process_has_it(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(workspace.recipe, "--run-dir", run)
    latest = run / "checkpoints" / "latest"
    latest.unlink()
    latest.symlink_to("step-00000005")
    # Neither the link is mended nor other options or the end of the run found out.
    for options in ([], ["--optimizer.max-lr", "0.02"]):
        with locked(run), pytest.raises(SystemExit) as stop:
            train(workspace.recipe, "--run-dir", run, *options)
        assert stop.value.code == 2
        assert "another process is writing into" in capsys.readouterr().err
    assert latest.resolve().name == "step-00000005"


def test_no_other_process_goes_on_with_a_run_that_is_starting_up(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    train(workspace.recipe, "--run-dir", run)
    longer = ["--training.training-tokens", 20 * 256]
    newest, others = setup.newest_checkpoint, []

    def newest_until_another_tries(*arguments: Any) -> Any:
        found = newest(*arguments)
        others.append(train_with("", 10, "--resume", run, *longer))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(setup, "newest_checkpoint", newest_until_another_tries)
        train("--resume", run, "--training.training-tokens", 15 * 256)
    (other,) = others
    assert other.returncode == 2, other.stdout
    assert "another process is writing into" in other.stderr
    # Once the first is done, from where it came to.
    assert "resuming after update 15 of 20" in train_with("", 15, "--resume", run, *longer).stdout
    assert list(losses(run)) == list(range(1, 21))
    assert not list(run.glob("superseded-*"))


def test_nothing_is_left_of_a_new_run_that_is_refused(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> Any:
        raise ValueError("there are no such operators")

    monkeypatch.setattr(setup, "choose_operators", refuse)
    (tmp_path / "old").mkdir()
    for run in (tmp_path / "runs" / "new", tmp_path / "old"):
        with pytest.raises(SystemExit) as stop:
            train(workspace.recipe, "--run-dir", run)
        assert stop.value.code == 2
    # The folder that was there before stays.
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_what_is_held_out_is_told(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    prepare([str(workspace.corpus)], workspace.tokenizer, data)
    train(workspace.recipe, "--run-dir", tmp_path / "run", "--data.path", data)
    told = capsys.readouterr().out
    assert "epochs wanted; nothing held out: no validation (prepare --validation-fraction)" in told
    dataset = open_dataset(load_recipe(workspace.recipe))
    n_tokens = dataset.manifest.splits["validation"].tokens
    assert setup.describe_validation(dataset) == f"{n_tokens:,} held out"
    # As opened when the held-out text is short.
    short = dataclasses.replace(dataset, validation=None)
    what = setup.describe_validation(short)
    assert what.startswith("less than a sequence held out: no validation")


def test_the_session_counts_on_after_a_rewind(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, real, calls = tmp_path / "run", trainer.update, 0

    def update(optimizer: Any, loss: Any, *rest: Any) -> Any:
        nonlocal calls
        calls += 1
        return real(optimizer, loss * float("nan") if calls in (7, 8, 9) else loss, *rest)

    monkeypatch.setattr(trainer, "update", update)
    train(workspace.recipe, "--run-dir", run, "--training.rewind-after", 3)
    # After update 9 back to the checkpoint of update 5.
    logged = rows(run)
    assert [int(row["step"]) for row in logged] == list(range(1, 11))
    assert [int(row["tokens_total"]) for row in logged] == [256 * step for step in range(1, 11)]
    done = [*range(1, 6), *range(10, 15)]
    assert [int(row["tokens"]) for row in logged] == [256 * n for n in done]
    times = [float(row["time_s"]) for row in logged]
    again = (run / "superseded-metrics.csv").read_text().splitlines()
    before = [float(line.split(",")[COLUMNS.index("time_s")]) for line in again]
    assert times[:5] + before + times[5:] == sorted(times + before)
    assert all(float(row["tok_per_s"]) > 0 for row in logged)


def test_ranks_train_the_same_model(workspace: Workspace, tmp_path: Path) -> None:
    single, double = tmp_path / "single", tmp_path / "double"
    train(workspace.recipe, "--run-dir", single)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", "-m", "fastllama", "train", str(workspace.recipe)]
    done = subprocess.run(
        [*command, "--run-dir", str(double)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    one, two = losses(single), losses(double)
    assert list(two) == list(one)
    # Two runs that both learn nothing would agree as well.
    assert float(two[10]) < float(two[1]) - 0.5
    for step, loss in one.items():
        # Gradients of two halves are summed in another order: float32 rounding, amplified by 10
        # updates at a learning rate of 1e-2.
        assert float(two[step]) == pytest.approx(float(loss), rel=1e-5)
    for row, other in zip(rows(single), rows(double), strict=True):
        if row["val_loss"]:
            assert float(other["val_loss"]) == pytest.approx(float(row["val_loss"]), rel=1e-5)
    # Written by two processes, read by one.
    train("--resume", double, "--training.training-tokens", 12 * 256)
    assert list(losses(double)) == list(range(1, 13))


def test_compiled_blocks_train_the_same_model(workspace: Workspace, tmp_path: Path) -> None:
    eager, compiled = tmp_path / "eager", tmp_path / "compiled"
    train(workspace.recipe, "--run-dir", eager)
    # In a process of its own, because torch.compile warns about itself and warnings are errors.
    options = ["--run-dir", compiled, "--training.compile", "true"]
    done = train_with("", 0, workspace.recipe, *options)
    assert done.returncode == 0, done.stderr
    for step, loss in losses(eager).items():
        assert float(losses(compiled)[step]) == pytest.approx(float(loss), rel=1e-4)


def test_bfloat16_compute_keeps_float32_parameters(workspace: Workspace, tmp_path: Path) -> None:
    from safetensors import safe_open

    run = tmp_path / "run"
    train(workspace.recipe, "--run-dir", run, "--training.dtype", "bfloat16")
    (shard,) = (run / "checkpoints" / "latest").glob("*.safetensors")
    with safe_open(str(shard), framework="pt") as tensors:
        names = set(tensors.keys())
        kinds = {tensors.get_slice(name).get_dtype() for name in names}
    assert kinds == {"F32"}
    assert {"model.embedding.weight", "optimizer.exp_avg.blocks.1.mlp.down.weight"} <= names
    # 15 weights, and of each the two moments and the step count of AdamW.
    assert len(names) == 4 * 15
    assert float(rows(run)[-1]["loss"]) < 5.3
