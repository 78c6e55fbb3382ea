"""`fastllama verify-resume`: its verdict on given losses, and one verification from end to end."""

import math
import re
import subprocess
import sys

import pytest

from fastllama.cli import main
from fastllama.config import Config, ParallelConfig, TrainingConfig
from fastllama.tools.verify_resume import Comparison, Plan, shortened, tolerance, verdict
from tests.workspace import Workspace

SAME, OTHER = Plan(4, 2, 2, 2), Plan(4, 2, 2, 1)
LOSSES = [4.0, 3.0, 2.0, 1.0]
FLOAT32 = Config(training=TrainingConfig(dtype="float32"))
DETERMINISTIC = Config(training=TrainingConfig(deterministic=True))


def compare(changed: dict[int, float], allowed: float) -> Comparison:
    """`LOSSES` against themselves with those of some updates changed."""
    other = [changed.get(step, loss) for step, loss in enumerate(LOSSES, 1)]
    return Comparison(LOSSES, other, allowed, went_on_from=1)


def test_the_same_bits() -> None:
    comparison = compare({}, 0.0)
    assert comparison.first_wrong is None
    said = "same: with 2 and then 2 processes the losses of all 4 updates are bit-identical."
    assert verdict(comparison, FLOAT32, SAME) == said


def test_one_bit_is_a_difference_for_the_same_layout() -> None:
    comparison = compare({3: math.nextafter(2.0, 3.0)}, tolerance(FLOAT32, SAME))
    assert comparison.first_wrong == 3
    said = verdict(comparison, FLOAT32, SAME)
    assert said.startswith("different: with 2 and then 2 processes losses differ by 2.2e-16 in ")
    assert "in update 3, where none may." in said
    assert said.endswith("On CUDA, try --training.deterministic true.")
    assert "deterministic" not in verdict(comparison, DETERMINISTIC, SAME)


def test_another_layout_may_differ_by_rounding() -> None:
    allowed = tolerance(FLOAT32, OTHER)
    near = compare({2: 3.0 + 2e-6}, allowed)
    assert near.first_wrong is None
    assert "at most 6.7e-07, in update 2, where 1e-06 is allowed" in verdict(near, FLOAT32, OTHER)
    # In the first update that goes on it would be too much, two later it is not.
    grown = compare({4: 1.0 + 3e-6}, allowed)
    assert grown.first_wrong is None
    far = compare({2: 3.0 + 6e-6, 4: 1.0 + 3e-6}, allowed)
    assert far.first_wrong == 2
    said = verdict(far, FLOAT32, OTHER)
    assert "differ by 2e-06 in update 2, where 1e-06 is allowed" in said


def test_what_is_allowed_grows_with_training_and_has_an_end() -> None:
    comparison = Comparison([], [], 1e-6, went_on_from=4)
    allowed = [comparison.allowed(step) for step in (1, 5, 6, 8, 100)]
    assert allowed == pytest.approx([1e-6, 1e-6, 2e-6, 8e-6, 1e-2])
    assert Comparison([], [], 0.0, went_on_from=4).allowed(100) == 0.0


def test_bfloat16_anywhere_widens_what_is_allowed() -> None:
    reduced = Config(
        training=TrainingConfig(dtype="float32"), parallel=ParallelConfig(reduce_dtype="bfloat16")
    )
    assert tolerance(Config(), OTHER) == tolerance(reduced, OTHER) == 1e-3
    assert tolerance(Config(), SAME) == 0.0


def test_losses_that_are_no_numbers() -> None:
    for one, other, wrong in (
        (math.nan, math.nan, None),
        (math.inf, math.inf, None),
        (math.nan, 1.0, 1),
        (1.0, math.inf, 1),
        (0.0, 1.0, 1),
    ):
        assert Comparison([one], [other], 1e-3, went_on_from=0).first_wrong == wrong


def test_the_table_has_a_line_an_update() -> None:
    header, *lines = compare({2: 3.3}, 0.0).table().splitlines()
    assert header.split() == ["step", "left", "alone", "resumed", "difference"]
    assert [line.split()[0] for line in lines] == ["1", "2", "3", "4"]
    assert lines[1].split() == ["2", "3.000000000", "3.300000000", "0.1"]


def test_the_trainings_are_short_and_save_before_the_kill() -> None:
    plan = Plan(steps=20, interrupt_at=10, processes=1, resume_processes=1)
    config = shortened(Config(), plan)
    assert config.n_updates == 20
    assert config.optimizer.warmup_iterations == 10
    assert config.checkpoint.interval_tokens == 6 * config.training.tokens_per_update
    assert config.model == Config().model


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--interrupt-at 20", "--interrupt-at 20 must be at least 1 and less than --steps 20"),
        ("--interrupt-at 0", "--interrupt-at 0 must be at least 1"),
        ("--processes 0", "needs at least 1 process, not 0"),
        ("--resume-processes 3", "is not a multiple of batch_size x max_seq_len x devices"),
        ("--model.n-layer 4", "did you mean model.n_layers?"),
    ],
)
def test_what_cannot_be_tried(
    options: str, expected: str, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["verify-resume", str(workspace.recipe), *options.split()])
    assert stop.value.code == 2
    assert expected in capsys.readouterr().err


def test_a_recipe_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["verify-resume", "--steps", "3"])
    assert stop.value.code == 2
    assert "Give a recipe, fastllama verify-resume CONFIG.toml" in capsys.readouterr().err


def test_a_training_that_fails_is_told_of(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["verify-resume", str(workspace.recipe), "--data.path", "nowhere"])
    assert stop.value.code == 1
    assert "A training failed: " in (told := capsys.readouterr().err)
    assert "nowhere does not exist" in told


def test_a_kill_is_outlived(workspace: Workspace) -> None:
    plan = ["--steps", "40", "--interrupt-at", "12"]
    done = subprocess.run(
        [sys.executable, "-m", "fastllama", "verify-resume", str(workspace.recipe), *plan],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *_, last, said = done.stdout.splitlines()
    assert last.split()[0] == "40"
    assert said == "same: with 1 and then 1 process the losses of all 40 updates are bit-identical."
    # With a checkpoint every 8 updates, and a kill that may come late.
    assert re.search(r"going on from the checkpoint of update (8|16|24|32) on", done.stdout)
