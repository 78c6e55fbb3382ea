"""How benchmarks/cpu_commands.py times processes and checkpoints."""

import sys
from pathlib import Path

import pytest
import torch

from benchmarks.cpu_commands import checkpoints, seconds
from fastllama.checkpoints.writing import CheckpointWriter
from fastllama.config import Config, TrainingConfig
from fastllama.distributed.world import distributed

PYTHON = [sys.executable, "-c"]


def test_seconds_end_at_the_line_or_with_the_process() -> None:
    code = "import time; print('ready', flush=True); time.sleep(2)"
    assert seconds([*PYTHON, code], "ready") < 2 < seconds([*PYTHON, code])


@pytest.mark.parametrize(
    ("code", "until"), [("print('no')", "yes"), ("print('no'); exit(3)", "")], ids=["line", "exit"]
)
def test_a_failed_command_is_not_timed(code: str, until: str) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)failed:\nno"):
        seconds([*PYTHON, code], until)


def test_checkpoints_of_both_are_written_and_loaded(tmp_path: Path) -> None:
    config = Config(training=TrainingConfig(device="cpu"))
    (tmp_path / "checkpoints").mkdir()
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4)}
    with (
        distributed(config) as world,
        CheckpointWriter(tmp_path / "checkpoints", config, {}, world.device, print) as writer,
    ):
        found = list(checkpoints(writer, tensors, tmp_path, 1))
    assert [job for job, _, _ in found] == ["save, waiting", "save", "load"]
    assert all(0 < time < 60 for _, *times in found for time in times)
    assert found[0][1] <= found[1][1]
    torch.testing.assert_close(torch.load(tmp_path / "plain.pt"), tensors)
