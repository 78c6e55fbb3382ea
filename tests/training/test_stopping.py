"""Stopping early: by a signal or by the clock, in the loop and before it, on all ranks together."""

import csv
import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

import fastllama.train as trainer
from fastllama.cli import main
from fastllama.config import load_recipe
from fastllama.run_folder import RunFolder
from tests.workspace import Workspace

# Runs the command; when the function `name` of fastllama.train is called for the so-manieth time on
# one rank, something is done first.
STRIKING = """
import os, signal, sys, time
import fastllama.train
from fastllama.cli import main

name, call, rank = sys.argv[1], int(sys.argv[2]), sys.argv[3]
original, calls = getattr(fastllama.train, name), 0
def struck(*arguments, **options):
    global calls
    calls += 1
    if calls == call and os.environ.get("RANK", "0") == rank:
        {act}
    return original(*arguments, **options)
setattr(fastllama.train, name, struck)
main(["train", *sys.argv[4:]])
"""
KILL = "os.kill(os.getpid(), signal.{})"
TWO_RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def train(*args: str | Path) -> None:
    main(["train", *map(str, args)])


def train_struck(
    folder: Path,
    act: str,
    where: tuple[str, int],
    *args: str | Path,
    launcher: tuple[str, ...] = (),
    rank: int = 0,
) -> subprocess.CompletedProcess[str]:
    """Train in processes of their own, one of which does `act` in a call of a function."""
    script = folder / "striking.py"
    script.write_text(STRIKING.format(act=act))
    name, call = where
    return subprocess.run(
        [sys.executable, *launcher, str(script), name, str(call), str(rank), *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def losses(run: Path) -> dict[int, str]:
    with open(run / "metrics.csv", newline="") as file:
        return {int(row["step"]): row["loss"] for row in csv.DictReader(file)}


def written(run: Path) -> dict[Path, int]:
    """The files of checkpoints and logs, and when they were last changed."""
    files = [*(run / "checkpoints").rglob("*"), *run.glob("*.csv"), *run.glob("*.jsonl")]
    return {path: path.stat().st_mtime_ns for path in files}


@pytest.fixture(scope="module")
def straight(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """The losses of a run that is left alone."""
    run = tmp_path_factory.mktemp("straight") / "run"
    train(workspace.recipe, "--run-dir", run)
    return losses(run)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_signal_finishes_the_update_and_saves(
    workspace: Workspace, tmp_path: Path, straight: dict[int, str], name: str
) -> None:
    run = tmp_path / "run"
    strike = tmp_path, KILL.format(name), ("update", 3)
    done = train_struck(*strike, workspace.recipe, "--run-dir", run)
    assert done.returncode == 85, done.stderr
    assert f"fastllama train --resume {run}" in " ".join(done.stdout.split())
    last = max(losses(run))
    assert last in (3, 4)
    assert (run / "checkpoints" / "latest").resolve().name == f"step-{last:08d}"
    train("--resume", run)
    assert losses(run) == straight


def test_second_signal_stops_at_once(workspace: Workspace, tmp_path: Path) -> None:
    # Any two: a scheduler warns with one and ends with another.
    twice = "[os.kill(os.getpid(), s) for s in (signal.SIGUSR1, signal.SIGINT)]"
    strike = tmp_path, twice, ("update", 3)
    done = train_struck(*strike, workspace.recipe, "--run-dir", tmp_path / "run")
    assert done.returncode == -signal.SIGINT


def test_wall_time_saves_and_stops(
    workspace: Workspace, tmp_path: Path, straight: dict[int, str]
) -> None:
    run = tmp_path / "run"
    # An hour passes in the first update.
    hour = "real = time.perf_counter; time.perf_counter = lambda: real() + 3600"
    limit = ["--training.max-wall-time", "30"]
    strike = tmp_path, hour, ("update", 1)
    done = train_struck(*strike, workspace.recipe, "--run-dir", run, *limit)
    assert done.returncode == 85, done.stderr
    assert f"fastllama train --resume {run}" in " ".join(done.stdout.split())
    assert (run / "checkpoints" / "latest").resolve().name == "step-00000002"
    train("--resume", run, "--training.max-wall-time", 10)
    assert losses(run) == straight


def test_a_run_that_is_stopped_before_its_first_update_has_only_its_folder(
    workspace: Workspace, tmp_path: Path, straight: dict[int, str]
) -> None:
    run = tmp_path / "run"
    strike = tmp_path, KILL.format("SIGTERM"), ("open_session", 1)
    done = train_struck(*strike, workspace.recipe, "--run-dir", run)
    assert done.returncode == 85, done.stderr
    assert "Stopped before update 1: there was nothing new to save." in done.stdout
    assert f"fastllama train --resume {run}" in " ".join(done.stdout.split())
    assert written(run) == {}
    train("--resume", run)
    assert losses(run) == straight


def test_a_stop_before_the_first_update_of_a_resumed_run_saves_nothing(
    workspace: Workspace, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(workspace.recipe, "--run-dir", run)
    before = written(run)
    more = ["--training.training-tokens", "3072"]
    strike = tmp_path, KILL.format("SIGUSR1"), ("build_state", 1)
    done = train_struck(*strike, "--resume", run, *more)
    assert done.returncode == 85, done.stderr
    assert "Stopped before update 11: there was nothing new to save." in done.stdout
    assert written(run) == before
    train("--resume", run)
    assert list(losses(run)) == list(range(1, 13))


def test_wall_time_that_is_up_before_the_weights_are_built(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_recipe(workspace.recipe)
    short = dataclasses.replace(config.training, max_wall_time=1e-3 / 60)
    run = RunFolder(tmp_path / "run")
    monkeypatch.setattr(trainer, "build_state", lambda *arguments: pytest.fail("built"))
    console = Console(quiet=True)
    assert not trainer.train(dataclasses.replace(config, training=short), run, console)
    assert written(run.path) == {}


@pytest.mark.parametrize(("where", "last"), [(("build_state", 1), 0), (("update", 3), 4)])
def test_ranks_stop_together(
    workspace: Workspace, tmp_path: Path, where: tuple[str, int], last: int
) -> None:
    run = tmp_path / "run"
    strike = tmp_path, KILL.format("SIGTERM"), where
    options = ["--run-dir", run, "--checkpoint.interval-tokens", "0"]
    done = train_struck(*strike, workspace.recipe, *options, launcher=TWO_RANKS, rank=1)
    # torchrun knows success and failure only.
    assert done.returncode == 1
    assert "no failure: stopped early and saved, exit code 85" in done.stderr
    assert f"fastllama train --resume {run}" in " ".join(done.stdout.split())
    shards = (run / "checkpoints").glob("step-*/*.safetensors")
    expected = [f"step-{last:08d}"] * 2 if last else []
    assert [shard.parent.name for shard in shards] == expected
