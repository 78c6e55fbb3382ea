"""Resuming from an older checkpoint, in the run's folder or as a branch in a new one."""

import hashlib
import shutil
from pathlib import Path

import pytest

from fastllama.checkpoints.folder import latest_name
from tests.runs import losses, train
from tests.workspace import Workspace

STEP_5, STEP_10 = "step-00000005", "step-00000010"


@pytest.fixture(scope="module")
def finished(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 10 updates with checkpoints after 5 and 10."""
    run = tmp_path_factory.mktemp("finished") / "run"
    train(workspace.recipe, "--run-dir", run)
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run", symlinks=True))


def content(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def refusal(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    with pytest.raises(SystemExit) as stop:
        train(*args)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_older_checkpoint_repeats_the_updates_after_it(
    run: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train("--resume", run / "checkpoints" / STEP_5)
    assert losses(run) == losses(finished)
    printed = capsys.readouterr().out
    assert "resuming after update 5 of 10" in printed
    kept = run / "checkpoints" / f"passed-over-{STEP_10}-1"
    assert content(kept) == content(finished / "checkpoints" / STEP_10)
    assert f"the run resumes from {STEP_5}, which is older. It is kept as {kept.name}." in printed
    assert latest_name(run / "checkpoints") == STEP_10
    # The rows of the updates that are repeated.
    assert len(list(run.glob("superseded-*"))) > 0


def test_the_same_command_goes_on_after_a_stop(
    run: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Stopped at once: there is nothing to save. Then stopped after an update, and saved.
    again = ["--resume", run / "checkpoints" / STEP_5, "--training.training-tokens"]
    train(*again, 7 * 256)
    capsys.readouterr()
    train(*again, 7 * 256)
    assert f"{run} has done all of its 7 updates." in capsys.readouterr().out
    # Other options go back again.
    train(*again, 10 * 256)
    assert "resuming after update 5 of 10" in capsys.readouterr().out
    assert losses(run) == losses(finished)


def test_a_checkpoint_that_was_set_aside_is_renamed_first(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    aside = run / "checkpoints" / f"passed-over-{STEP_5}-1"
    shutil.copytree(run / "checkpoints" / STEP_5, aside)
    before = content(run)
    assert f"rename it to {STEP_5}, or train on in another folder with --run-dir." in refusal(
        capsys, "--resume", aside
    )
    assert content(run) == before


def test_a_run_that_starts_over_says_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (STEP_5, STEP_10):
        (run / "checkpoints" / name).rename(run / "checkpoints" / f"passed-over-{name}-1")
    sentence = f"No checkpoint of {run} can be used: it starts from the beginning."
    train("--resume", run)
    assert sentence in capsys.readouterr().out
    train("--resume", run)
    assert sentence not in capsys.readouterr().out


def test_a_run_has_done_more_than_it_is_asked_for(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train("--resume", run, "--training.training-tokens", 6 * 256)
    done = f"{run} has done 10 updates, more than the 6 of training.training_tokens."
    assert done in capsys.readouterr().out


def test_older_checkpoint_goes_on_with_other_options(run: Path, finished: Path) -> None:
    longer = ["--training.training-tokens", 12 * 256]
    train("--resume", run / "checkpoints" / STEP_5, "--optimizer.max-lr", 0.05, *longer)
    before, now = losses(finished), losses(run)
    assert list(now) == list(range(1, 13))
    # The sixth loss is of the weights before the sixth update.
    assert [now[step] == before[step] for step in range(1, 11)] == 6 * [True] + 4 * [False]


def test_branch_leaves_its_run_as_it_is(
    run: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, branch = content(run), tmp_path / "branch"
    train("--resume", run / "checkpoints" / STEP_5, "--run-dir", branch)
    assert content(run) == before
    assert losses(branch) == {step: losses(finished)[step] for step in range(6, 11)}
    capsys.readouterr()
    # Once the branch has checkpoints, the same command resumes the branch.
    longer = ["--training.training-tokens", 12 * 256]
    train("--resume", run / "checkpoints" / STEP_5, "--run-dir", branch, *longer)
    assert "resuming after update 10 of 12" in capsys.readouterr().out
    assert list(losses(branch)) == list(range(6, 13))
    assert content(run) == before


def test_branch_goes_on_only_from_its_origin(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    branch, longer = tmp_path / "branch", ["--training.training-tokens", 12 * 256]
    origin, other = (run / "checkpoints" / name for name in (STEP_5, STEP_10))
    train("--resume", origin, "--run-dir", branch)
    before = content(branch)
    message = refusal(capsys, "--resume", other, "--run-dir", branch, *longer)
    assert f"{branch} holds a run that did not branch off from {other}; choose another" in message
    assert f"or resume that run with --resume {branch}." in message
    message = refusal(capsys, "--resume", branch / "checkpoints" / STEP_10, "--run-dir", run)
    assert f"{run} holds a run that did not branch off from {branch}" in message
    assert content(branch) == before
    train("--resume", origin, "--run-dir", branch, *longer)
    assert "resuming after update 10 of 12" in capsys.readouterr().out


def test_latest_is_the_newest_checkpoint(run: Path, tmp_path: Path) -> None:
    branch, longer = tmp_path / "branch", ["--training.training-tokens", 12 * 256]
    train("--resume", run / "checkpoints" / "latest", "--run-dir", branch, *longer)
    assert list(losses(branch)) == [11, 12]


def test_unusable_checkpoint_changes_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, branch = run / "checkpoints", tmp_path / "branch"
    next((folder / STEP_5).glob("*.safetensors")).write_bytes(b"")
    before = content(run)
    resume = ["--resume", folder / STEP_5]
    assert "The checkpoint is damaged: " in refusal(capsys, *resume)
    assert "The checkpoint is damaged: " in refusal(capsys, *resume, "--run-dir", branch)
    gone = refusal(capsys, "--resume", folder / "step-00000007")
    assert f"There is no checkpoint {folder / 'step-00000007'}; {folder} has {STEP_10}" in gone
    other = ["--resume", folder / STEP_10, "--training.seed", 7]
    message = refusal(capsys, *other)
    assert "was trained with training.seed = 1337, not 7; keep that value to resume, or" in message
    assert f"--training.init-from {folder / STEP_10}." in message
    assert content(run) == before
    assert not branch.exists()


def test_branch_needs_a_checkpoint(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(capsys, "--resume", run, "--run-dir", tmp_path / "branch")
    assert f"branch off from a checkpoint: --resume {run / 'checkpoints' / 'latest'}." in message
