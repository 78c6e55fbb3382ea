"""Stopping early: by a signal or by time, in the loop or before it, on all ranks together."""

import dataclasses
import fcntl
import os
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from rich.console import Console

import fastllama.train as trainer
from fastllama.config import load_recipe
from fastllama.run_folder import RunFolder
from fastllama.training.stopping import stop_signals
from tests.runs import losses, train
from tests.workspace import Workspace

# Runs the command. One call of one function of fastllama.train, on one rank, first runs `{code}`.
INTERRUPTED = """
import os, signal, sys, time
import fastllama.train
from fastllama.cli import main

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # pytest may run under nohup
name, call, rank = sys.argv[1], int(sys.argv[2]), sys.argv[3]
original, calls = getattr(fastllama.train, name), 0
def interrupted(*arguments, **options):
    global calls
    calls += 1
    if calls == call and os.environ.get("RANK", "0") == rank:
        {code}
    return original(*arguments, **options)
setattr(fastllama.train, name, interrupted)
main(["train", *sys.argv[4:]])
"""
KILL = "os.kill(os.getpid(), signal.{})"
TWO_RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def train_interrupted(
    folder: Path,
    code: str,
    where: tuple[str, int],
    *args: str | Path,
    launcher: tuple[str, ...] = (),
    rank: int = 0,
) -> subprocess.CompletedProcess[str]:
    """Train in new processes; `rank` runs a line of code before a call of a function.

    `where` is the name of the function and the number of the call, from 1.
    """
    script = folder / "interrupted.py"
    script.write_text(INTERRUPTED.format(code=code))
    name, call = where
    return subprocess.run(
        [sys.executable, *launcher, str(script), name, str(call), str(rank), *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def modification_times(run: Path) -> dict[Path, int]:
    """The files of checkpoints and logs, and when they were last modified."""
    files = [*(run / "checkpoints").rglob("*"), *run.glob("*.csv"), *run.glob("*.jsonl")]
    return {path: path.stat().st_mtime_ns for path in files}


@pytest.fixture(scope="module")
def uninterrupted(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """The losses of an uninterrupted run."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    train(workspace.recipe, "--run-dir", run)
    return losses(run)


# One handler takes all four.
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("SIGINT", "SIGUSR1", "SIGHUP")]


@pytest.mark.parametrize("name", ["SIGTERM", *OTHERS])
def test_signal_finishes_the_update_and_saves(
    workspace: Workspace, tmp_path: Path, uninterrupted: dict[int, str], name: str
) -> None:
    run = tmp_path / "run"
    interruption = tmp_path, KILL.format(name), ("update", 3)
    done = train_interrupted(*interruption, workspace.recipe, "--run-dir", run)
    assert done.returncode == 85, done.stderr
    assert f"fastllama train --resume {run}" in " ".join(done.stdout.split())
    last = max(losses(run))
    assert last in (3, 4)
    assert (run / "checkpoints" / "latest").resolve().name == f"step-{last:08d}"
    train("--resume", run)
    assert losses(run) == uninterrupted


def test_second_signal_stops_at_once(workspace: Workspace, tmp_path: Path) -> None:
    # Two different signals: a scheduler warns with one and ends the job with another.
    twice = "[os.kill(os.getpid(), s) for s in (signal.SIGUSR1, signal.SIGINT)]"
    interruption = tmp_path, twice, ("update", 3)
    done = train_interrupted(*interruption, workspace.recipe, "--run-dir", tmp_path / "run")
    assert done.returncode == -signal.SIGINT


def own_terminal() -> None:
    """Make stdin the terminal of this session, whose end the kernel reports."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_second_signal_leaves_a_visible_cursor() -> None:
    leader, terminal = os.openpty()
    code = "import os, signal, time\nfrom fastllama.training.stopping import stop_signals\n"
    code += "with stop_signals():\n    [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]"
    done = subprocess.run([sys.executable, "-c", code], stdout=terminal, stderr=subprocess.PIPE)
    os.close(terminal)
    assert done.returncode == -signal.SIGINT
    assert b"\x1b[?25h" in os.read(leader, 100)
    os.close(leader)
    assert b"\x1b" not in done.stderr


def test_closed_terminal_stops_and_saves(workspace: Workspace, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ours, terminal = os.openpty()
    training = subprocess.Popen(
        [
            *(sys.executable, "-m", "fastllama", "train", workspace.recipe, "--run-dir", run),
            *("--training.training-tokens", "256000", "--logging.sample-interval", "0"),
        ],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        preexec_fn=own_terminal,
    )
    os.close(terminal)
    printed = b""
    while b"step 3 " not in printed:
        printed += os.read(ours, 4096)
    # The kernel sends SIGHUP, and every later write to the terminal fails.
    os.close(ours)
    assert training.wait() == 85
    last = max(losses(run))
    assert last < 1000
    assert (run / "checkpoints" / "latest").resolve().name == f"step-{last:08d}"


def test_hangup_may_be_sent_twice() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with stop_signals() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.requested
    assert signal.signal(signal.SIGHUP, before) is signal.SIG_DFL


def test_ignored_hangup_stays_ignored() -> None:
    # As under nohup.
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stop_signals() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.requested
    assert signal.signal(signal.SIGHUP, before) is signal.SIG_IGN


def test_wall_time_saves_and_stops(
    workspace: Workspace, tmp_path: Path, uninterrupted: dict[int, str]
) -> None:
    run = tmp_path / "run"
    # In the first update the clock jumps by an hour.
    hour = "real = time.perf_counter; time.perf_counter = lambda: real() + 3600"
    limit = ["--training.max-wall-time", "30"]
    interruption = tmp_path, hour, ("update", 1)
    done = train_interrupted(*interruption, workspace.recipe, "--run-dir", run, *limit)
    assert done.returncode == 85, done.stderr
    assert f"fastllama train --resume {run}" in " ".join(done.stdout.split())
    assert (run / "checkpoints" / "latest").resolve().name == "step-00000002"
    train("--resume", run, "--training.max-wall-time", 10)
    assert losses(run) == uninterrupted


def test_stop_before_the_first_update_saves_nothing(
    workspace: Workspace, tmp_path: Path, uninterrupted: dict[int, str]
) -> None:
    run = tmp_path / "run"
    interruption = tmp_path, KILL.format("SIGTERM"), ("open_session", 1)
    done = train_interrupted(*interruption, workspace.recipe, "--run-dir", run)
    assert done.returncode == 85, done.stderr
    assert "Stopped before update 1: there was nothing new to save." in done.stdout
    assert f"fastllama train --resume {run}" in " ".join(done.stdout.split())
    assert modification_times(run) == {}
    train("--resume", run)
    assert losses(run) == uninterrupted


def test_stop_before_the_first_update_after_resuming_saves_nothing(
    workspace: Workspace, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(workspace.recipe, "--run-dir", run)
    before = modification_times(run)
    more = ["--training.training-tokens", "3072"]
    interruption = tmp_path, KILL.format("SIGUSR1"), ("build_state", 1)
    done = train_interrupted(*interruption, "--resume", run, *more)
    assert done.returncode == 85, done.stderr
    assert "Stopped before update 11: there was nothing new to save." in done.stdout
    assert modification_times(run) == before
    train("--resume", run)
    assert list(losses(run)) == list(range(1, 13))


def test_wall_time_that_ends_before_the_weights_are_built(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_recipe(workspace.recipe)
    short = dataclasses.replace(config.training, max_wall_time=1e-3 / 60)
    run = RunFolder(tmp_path / "run")
    monkeypatch.setattr(trainer, "build_state", lambda *arguments: pytest.fail("built"))
    console = Console(quiet=True)
    assert not trainer.train(dataclasses.replace(config, training=short), run, console)
    assert modification_times(run.path) == {}


@pytest.mark.parametrize(("where", "last"), [(("build_state", 1), 0), (("update", 3), 4)])
def test_ranks_stop_together(
    workspace: Workspace, tmp_path: Path, where: tuple[str, int], last: int
) -> None:
    run = tmp_path / "run"
    interruption = tmp_path, KILL.format("SIGTERM"), where
    options = ["--run-dir", run, "--checkpoint.interval-tokens", "0"]
    done = train_interrupted(*interruption, workspace.recipe, *options, launcher=TWO_RANKS, rank=1)
    # torchrun exits with 0 or 1 only.
    assert done.returncode == 1
    assert "no failure: stopped early and saved, exit code 85" in done.stderr
    assert f"fastllama train --resume {run}" in " ".join(done.stdout.split())
    shards = (run / "checkpoints").glob("step-*/*.safetensors")
    expected = [f"step-{last:08d}"] * 2 if last else []
    assert [shard.parent.name for shard in shards] == expected
