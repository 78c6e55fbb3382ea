"""When validation, samples and checkpoints are due, and that a failure of one ends no run.

As a script: trains a model that diverges, on two ranks of which one cannot read the held-out text.
"""

import dataclasses
import errno
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest

from fastllama.cli import main
from fastllama.config import CheckpointConfig, Config, LoggingConfig, ModelConfig, TrainingConfig
from fastllama.training import side_jobs
from fastllama.training.side_jobs import checkpoint_due, sample_due, validation_due
from tests.runs import losses, train
from tests.workspace import Workspace

CONFIG = Config(
    model=ModelConfig(max_seq_len=10),
    training=TrainingConfig(
        batch_size=1, tokens_per_update=100, training_tokens=10_000, eval_interval=30
    ),
    checkpoint=CheckpointConfig(interval_tokens=2_500),
    logging=LoggingConfig(sample_interval=8, sample_growth=1.5),
)


def test_validation_is_due_at_intervals_and_at_the_end() -> None:
    assert [step for step in range(1, 101) if validation_due(step, CONFIG)] == [30, 60, 90, 100]
    never = dataclasses.replace(
        CONFIG, training=dataclasses.replace(CONFIG.training, eval_interval=0)
    )
    assert not any(validation_due(step, never) for step in range(1, 101))


def test_sample_intervals_grow() -> None:
    # Intervals of 8, 12, 18 and 27. The next one, 40.5 rounded to 40, ends after the last update.
    assert [step for step in range(1, 101) if sample_due(step, CONFIG)] == [8, 20, 38, 65, 100]
    never = dataclasses.replace(CONFIG, logging=LoggingConfig(sample_interval=0))
    assert not any(sample_due(step, never) for step in range(1, 101))
    logging = LoggingConfig(sample_interval=8, sample_growth=1e308)
    once = dataclasses.replace(CONFIG, logging=logging)
    assert [step for step in range(1, 101) if sample_due(step, once)] == [8, 100]


def test_checkpoint_is_due_at_multiples_of_tokens() -> None:
    assert [step for step in range(1, 101) if checkpoint_due(step, CONFIG)] == [25, 50, 75, 100]
    uneven = dataclasses.replace(CONFIG, checkpoint=CheckpointConfig(interval_tokens=1_990))
    # The multiples 1,990, 3,980, … lie inside an update of 100 tokens, and that update is due.
    assert [step for step in range(1, 101) if checkpoint_due(step, uneven)] == [20, 40, 60, 80, 100]
    never = dataclasses.replace(CONFIG, checkpoint=CheckpointConfig(interval_tokens=0))
    assert not any(checkpoint_due(step, never) for step in range(1, 101))


def test_diverged_model_and_unreadable_text_end_no_run(
    workspace: Workspace, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, __file__, str(workspace.recipe), str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(sys.path)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for step in (4, 10):
        assert f"No sample after update {step}: the logits are not finite: " in done.stdout
    for step in (5, 10):
        sentence = f"No validation after update {step}: 1 of 2 ranks cannot read the held-out text"
        assert sentence in done.stdout
    lines = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    assert len(lines) == 1  # before the first update
    assert losses(tmp_path / "run")[10] == "nan"


def test_generate_with_a_diverged_model(
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    diverge(4, monkeypatch)
    run = tmp_path / "run"
    train(workspace.recipe, "--run-dir", run)
    capsys.readouterr()
    for temperature in ("0", "0.8"):
        with pytest.raises(SystemExit) as stop:
            main(["generate", str(run), "--temperature", temperature])
        assert stop.value.code == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: the logits are not finite: the model has diverged")


@pytest.fixture(scope="module")
def undisturbed(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """The losses of a run whose side jobs all work."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    train(workspace.recipe, "--run-dir", run)
    return losses(run)


@pytest.mark.parametrize(
    ("name", "what"), [("generate_text", "sample"), ("validation_loss", "validation")]
)
def test_side_job_that_fails_on_the_only_rank(
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    undisturbed: dict[int, str],
    name: str,
    what: str,
) -> None:
    def fail(*args: Any) -> NoReturn:
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(side_jobs, name, fail)
    train(workspace.recipe, "--run-dir", tmp_path / "run")
    expected = f"No {what} after update 10: RuntimeError: out of memory; training continues.\n"
    assert expected in capsys.readouterr().out
    assert losses(tmp_path / "run") == undisturbed


def test_faulty_matplotlib_is_reported_once(
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run = tmp_path / "run"
    train(workspace.recipe, "--run-dir", run)
    assert capsys.readouterr().out.count(f"The plot {run / 'loss.png'} could not be written: ") == 1


@pytest.mark.parametrize(
    "name", ["$A_$B ^{%s", "a\nb", "\x1b[31m", ":heart: [red]", "*?", "\udcff"]
)
def test_name_of_a_run_is_data(
    workspace: Workspace, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / name
    train(workspace.recipe, "--run-dir", run, "--logging.tensorboard", "true")
    printed = capsys.readouterr()
    assert (run / "loss.png").exists()
    assert "could not" not in printed.out
    assert "\x1b" not in printed.out + printed.err
    assert ":heart:" in printed.out or "heart" not in name


def test_sample_prints_no_escape_sequences(
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(side_jobs, "generate_text", lambda *args: iter(["\x1b]0;", "title\x07"]))
    run = tmp_path / "run"
    train(workspace.recipe, "--run-dir", run, "--logging.sample-prompt", "\x9b2J\n")
    assert "\\x9b2J\n\\x1b]0;title\\x07\n" in capsys.readouterr().out
    # The log keeps the text.
    assert '"text": "\\u001b]0;title\\u0007"' in (run / "samples.jsonl").read_text()


def diverge(step: int, patch: pytest.MonkeyPatch) -> None:
    """Make the weights NaN after update `step`."""
    import fastllama.train as trainer

    original, call = trainer.update, 0

    def update(optimizer: Any, *rest: Any) -> Any:
        nonlocal call
        call += 1
        result = original(optimizer, *rest)
        if call == step:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.data.fill_(math.nan)
        return result

    patch.setattr(trainer, "update", update)


def prepare_rank(rank: int) -> None:
    """Make the model diverge after update 4, and the held-out text unreadable on rank 1."""
    import fastllama.inference.evaluate as evaluate

    diverge(4, pytest.MonkeyPatch())

    def fill_batch(*args: Any) -> NoReturn:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    if rank == 1:
        evaluate.fill_batch = fill_batch


if __name__ == "__main__":
    from tests.ranks import launch

    recipe, run = sys.argv[1:]
    arguments = ["train", recipe, "--run-dir", run]
    outcome = launch(2, arguments, Path(f"{run}.log"), prepare=prepare_rank)
    print(outcome.printed)
    sys.exit(set(outcome.codes) != {0})
