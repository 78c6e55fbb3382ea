"""`fastllama verify-resume`: mistakes in its options, and one verification from end to end."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fastllama.cli import main
from fastllama.config import load_recipe
from fastllama.tools.verify_resume import Plan, shortened
from tests.workspace import Workspace


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--interrupt-at 20", "--interrupt-at 20 must be at least 1 and less than --steps 20"),
        ("--interrupt-at 0", "--interrupt-at 0 must be at least 1"),
        ("--steps 1", "--steps must be at least 2, not 1."),
        ("--run-dir runs/v", "Unknown option --run-dir; see fastllama verify-resume CONFIG.toml"),
        ("--processes 0", "needs at least 1 process, not 0"),
        ("--resume-processes 3", "is not a multiple of batch_size x max_seq_len x devices"),
        ("--model.n-layer 4", "did you mean model.n_layers?"),
    ],
)
def test_wrong_option(
    options: str, expected: str, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["verify-resume", str(workspace.recipe), *options.split()])
    assert stop.value.code == 2
    assert expected in capsys.readouterr().err


def test_no_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["verify-resume", "--steps", "3"])
    assert stop.value.code == 2
    assert "Give a recipe, fastllama verify-resume CONFIG.toml" in capsys.readouterr().err


def test_failing_training(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["verify-resume", str(workspace.recipe), "--data.path", "nowhere"])
    # As for `train`: a mistake of the user, and no broken resume.
    assert stop.value.code == 2
    assert "A training failed: " in (error := capsys.readouterr().err)
    assert "nowhere does not exist" in error


def test_stages_that_begin_later_are_left_out() -> None:
    config = load_recipe(Path("configs/llama-1b-anneal.toml"))
    assert [config.first_step(stage) > 20 for stage in config.data.stages] == [True]
    plan = Plan(steps=20, interrupt_at=10, processes=1, resume_processes=1)
    short = shortened(config, plan)
    assert short.data.stages == ()
    plan.validate(short)
    longer = replace(plan, steps=config.n_updates)
    assert shortened(config, longer).data.stages == config.data.stages


# The command around what test_killed_run_resumes_bit_identically shows in `make test`.
@pytest.mark.slow
def test_killed_training_resumes(workspace: Workspace) -> None:
    plan = ["--steps", "40", "--interrupt-at", "12"]
    done = subprocess.run(
        [sys.executable, "-m", "fastllama", "verify-resume", str(workspace.recipe), *plan],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *_, last, sentence = done.stdout.splitlines()
    assert last.split()[0] == "40"
    assert sentence == (
        "same: the losses of all 40 updates are bit-identical (1 process, then 1 process)."
    )
    # A checkpoint every 8 updates; the kill may come late.
    assert re.search(r"resuming from the checkpoint of update (8|16|24|32) on", done.stdout)
