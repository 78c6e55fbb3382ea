"""Which rank the others wait for, from seconds in collectives to the log."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastllama.logs.slow_rank import WINDOW, SlowRank
from tests.runs import rows
from tests.workspace import Workspace

# Runs the command. Rank 1 is late in every micro-batch.
LATE = """
import os, sys, time

from fastllama.cli import main
from fastllama.data.loader import BatchLoader

original = BatchLoader.next

def next(loader):
    if os.environ["RANK"] == "1":
        time.sleep(0.1)
    return original(loader)

BatchLoader.next = next
main(sys.argv[1:])
"""


def test_slow_rank_is_named_in_the_log(workspace: Workspace, tmp_path: Path) -> None:
    script, run = tmp_path / "late.py", tmp_path / "run"
    script.write_text(LATE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(script), "train", str(workspace.recipe)]
    command += ["--training.training-tokens", str(256 * 16), "--run-dir", str(run)]
    done = subprocess.run(
        [*command, "--training.eval-interval", "0", "--checkpoint.interval-tokens", "0"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    logged = rows(run)
    assert logged[0]["slow_rank"] == ""
    assert logged[-1]["slow_rank"] == "1"
    assert 0.3 < float(logged[-1]["slow_rank_share"]) < 1
    assert "waits for rank 1 " in done.stdout


def found(n_groups: int, *seconds: float) -> tuple[int, float] | None:
    slow_rank = SlowRank(n_groups)
    for _ in range(WINDOW):
        slow_rank.observe(list(seconds))
    return slow_rank.find()


def test_rank_that_waits_least_is_the_slow_one() -> None:
    assert found(1, 1.0, 0.25) == (1, 0.75)
    assert found(1, 1.0, 1.0, 0.5, 1.0, 1.25) == (2, 0.5)
    assert found(1, 0.0) == (0, 0.0)


def test_ranks_of_a_replica_are_compared() -> None:
    # The first replica waits for its rank 2; the second waits little, because nobody is late in it.
    assert found(2, 1.0, 1.0, 0.5, 1.0, 0.25, 0.25, 0.25, 0.25) == (2, 0.5)


def test_one_late_update_names_nobody() -> None:
    slow_rank = SlowRank(1)
    for update in range(WINDOW):
        assert slow_rank.find() is None
        slow_rank.observe([0.25, 9.0 if update == 3 else 0.25])
    assert slow_rank.find() == (0, 0.0)


@pytest.mark.parametrize("n_updates", [WINDOW, WINDOW + 5])
def test_recent_updates_count(n_updates: int) -> None:
    slow_rank = SlowRank(1)
    for _ in range(WINDOW):
        slow_rank.observe([1.0, 0.0])
    for _ in range(n_updates):
        slow_rank.observe([0.0, 1.0])
    assert slow_rank.find() == (0, 1.0)
