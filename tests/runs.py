"""Runs for tests: train through the command line, read the logs, make updates fail."""

import csv
import os
import subprocess
import sys
from collections.abc import Container
from pathlib import Path
from typing import Any

import pytest

import fastllama.train as trainer
from fastllama.cli import main

# Runs the command and executes `{each_update}` before each optimizer step, after the backward.
CHILD = """
import os, signal, sys
import fastllama.train
from fastllama.cli import main

original, step = fastllama.train.update, 0
def update(optimizer, loss, *rest):
    global step
    step += 1
    {each_update}
    return original(optimizer, loss, *rest)
fastllama.train.update = update
main(sys.argv[1:])
"""


def train(*args: object) -> None:
    """Run `fastllama train` with these arguments in this process."""
    main(["train", *map(str, args)])


def train_in_child(*args: object, each_update: str = "") -> subprocess.CompletedProcess[str]:
    """Run `fastllama train` in a new process, with a line of code before each optimizer step.

    The line may use `step`, the updates of this process counted from 1, and replace `loss`.
    """
    code = CHILD.format(each_update=each_update)
    return subprocess.run(
        [sys.executable, "-c", code, "train", *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def rows(run: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv."""
    with open(run / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def losses(run: Path) -> dict[int, str]:
    """The logged training losses by update, as text: equal text means equal bits."""
    return {int(row["step"]): row["loss"] for row in rows(run)}


def make_losses_nan(monkeypatch: pytest.MonkeyPatch, calls: Container[int]) -> None:
    """Replace the loss by NaN in these calls of `update`, counted from 1; a rewind repeats none."""
    original, call = trainer.update, 0

    def update(optimizer: Any, loss: Any, *rest: Any) -> Any:
        nonlocal call
        call += 1
        return original(optimizer, loss * float("nan") if call in calls else loss, *rest)

    monkeypatch.setattr(trainer, "update", update)
