"""A rank that fails among several: it speaks first, the others speak after it, and all end."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from fastllama.config import Config, TrainingConfig
from fastllama.distributed import failures
from fastllama.distributed.failures import failures_told
from fastllama.distributed.world import distributed
from fastllama.errors import PeerFailedError, RankFailedError
from tests.workspace import Workspace

# Runs the command. Rank 2 fails in its third update, when the others sit in a collective. As with
# NCCL, destroying the process group waits for them, and so may the end of the interpreter.
FAILING = """
import atexit, os, sys, time
from pathlib import Path

import torch
import torch.distributed as dist

import fastllama.train
from fastllama.checkpoints.writing import CheckpointWriter
from fastllama.cli import main

dist.destroy_process_group = lambda: time.sleep(100)
atexit.register(time.sleep, 100)
CheckpointWriter.__exit__ = lambda *args: print("waiting for the checkpoint", file=sys.stderr)
original, updates = fastllama.train.update, 0

def update(*args):
    global updates
    updates += 1
    if updates == 3 and os.environ["RANK"] == "2":
        Path(sys.argv[1]).touch()
        {how}
    return original(*args)

fastllama.train.update = update
main(sys.argv[2:])
"""

DEATHS = {
    "exception": (
        "raise RuntimeError('the third update went wrong')",
        "error: rank 2: RuntimeError: the third update went wrong",
        "1",
    ),
    "SIGKILL": ("os.kill(os.getpid(), 9)", "error: rank 2 is gone, and rank ", "-9"),
    "out of memory": (
        "raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')",
        "error: rank 2: Out of memory in update 3: CUDA out of memory. Tried to allocate 2.00 GiB.",
        "1",
    ),
    "sys.exit": ("sys.exit(7)", "error: rank 2: sys.exit(7) was called in the middle", "7"),
}
"""How rank 2 dies, the beginning of the first error, and the exit code that torchrun shows."""


# The first two stand for the others in `make test`: a rank that can speak, and one that cannot.
@pytest.mark.parametrize(
    ("how", "first_error", "code"),
    [
        pytest.param(*death, id=name, marks=[pytest.mark.slow] if number > 1 else [])
        for number, (name, death) in enumerate(DEATHS.items())
    ],
)
def test_culprit_speaks_first_and_all_end(
    how: str, first_error: str, code: str, workspace: Workspace, tmp_path: Path
) -> None:
    script, died = tmp_path / "failing.py", tmp_path / "died"
    script.write_text(FAILING.format(how=how))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "4", str(script), str(died), "train", str(workspace.recipe)]
    done = subprocess.run(
        [*command, "--run-dir", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    seconds = time.time() - died.stat().st_mtime
    lines = done.stderr.splitlines()
    errors = [line for line in lines if "error" in line.lower()]
    assert errors[0].startswith(first_error)
    # It is also the cause that torchrun names, with its exit code.
    cause = done.stderr.partition("Root Cause")[2]
    assert "rank      : 2 " in cause
    assert f"exitcode  : {code} " in cause
    # Each peer says why it ended.
    for rank in (0, 1, 3):
        (line,) = [
            line for line in errors if line.startswith("error: ") and f"rank {rank} f" in line
        ]
        assert "rank 2" in line
        assert "Connection" in line
    # Nothing that waits comes before the sentence.
    assert lines.index(errors[0]) < lines.index("waiting for the checkpoint")
    # The timeout of collectives is 10 minutes.
    assert seconds < 30


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dist.Store:
    """A store for failures; a rank that speaks after another one does not wait long for it."""
    store = dist.HashStore()
    monkeypatch.setattr(failures, "_get_default_store", lambda: store)
    monkeypatch.setattr(failures, "PEER_SECONDS", 0.1)
    return store


def fail(error: BaseException, rank: int = 0, pid: int | None = None) -> None:
    """Let `rank` of 8 fail; `pid` is the process of rank 5."""
    with failures_told(rank, 8, {rank: os.getpid()} | ({} if pid is None else {5: pid})):
        raise error


LOST = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:32650")


@pytest.mark.usefixtures("store")
def test_second_failure_is_told_after_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RankFailedError):
        fail(OSError("no space left"), rank=3)
    assert capsys.readouterr().err == "error: rank 3: no space left\n"
    for rank, error in ((1, LOST), (2, OSError("the disk is gone"))):
        with pytest.raises(PeerFailedError):
            fail(error, rank)
        assert capsys.readouterr().err.startswith(f"error: rank {rank} failed after rank 3: ")
    # The same mistake on every rank is told once.
    with pytest.raises(PeerFailedError):
        fail(OSError("no space left"), rank=4)
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("store")
def test_torchrun_takes_a_peer_for_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, now = tmp_path / "error.json", int(time.time())
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    times = []
    for rank, error in ((3, OSError("no space left")), (0, LOST)):
        with pytest.raises((RankFailedError, PeerFailedError)):
            fail(error, rank)
        times.append(int(json.loads(file.read_text())["message"]["extraInfo"]["timestamp"]))
    # A killed process has no time of its own: torchrun takes that of noticing it.
    assert times[0] <= now + 5 < now + 10 <= times[1]


@pytest.mark.usefixtures("store")
def test_killed_process_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with subprocess.Popen(["true"]) as killed:
        # A zombie until its launcher looks.
        os.waitid(os.P_PID, killed.pid, os.WEXITED | os.WNOWAIT)
        for rank in (0, 1):
            with pytest.raises(PeerFailedError):
                fail(LOST, rank, killed.pid)
            assert capsys.readouterr().err.startswith(
                f"error: rank 5 is gone, and rank {rank} failed without it: RuntimeError: [gloo/"
            )


@pytest.mark.usefixtures("store")
def test_lost_peer_that_nobody_knows_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RankFailedError):
        fail(dist.DistBackendError("NCCL error: unhandled system error"), pid=os.getpid())
    printed = capsys.readouterr().err
    assert printed.startswith("error: rank 0: DistBackendError: NCCL error")
    assert "Traceback" in printed


def test_store_that_hangs_delays_no_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    released = threading.Event()

    def hang() -> dist.Store:
        released.wait()
        raise RuntimeError("the host of the store is gone")

    monkeypatch.setattr(failures, "_get_default_store", hang)
    monkeypatch.setattr(failures, "STORE_SECONDS", 0.1)
    with pytest.raises(RankFailedError):
        fail(OSError("no space left"), rank=3)
    released.set()
    assert capsys.readouterr().err == "error: rank 3: no space left\n"


def test_failed_process_leaves_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    abort, released = failures._abort_process_group, threading.Event()

    def hang() -> None:
        released.wait()
        abort()

    monkeypatch.setattr(failures, "_abort_process_group", hang)
    monkeypatch.setattr(failures, "ABORT_SECONDS", 0.1)
    monkeypatch.setattr(dist, "destroy_process_group", released.wait)
    config = Config(training=TrainingConfig(device="cpu"))
    with pytest.raises(OSError, match="no space left"), distributed(config):
        raise OSError("no space left")
    released.set()
    while dist.is_initialized():
        time.sleep(0.01)
