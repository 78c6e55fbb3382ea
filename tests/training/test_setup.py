"""Setting up a run: locks, options that may not change, errors that leave nothing behind."""

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastllama.train as trainer
import fastllama.training.setup as setup
from fastllama.atomic import locked
from fastllama.checkpoints.state import TrainProgress
from fastllama.config import load_recipe
from fastllama.data.dataset import open_dataset
from fastllama.data.prepare import prepare
from fastllama.data.stream import TokenStream
from fastllama.distributed import fsdp
from fastllama.distributed.world import distributed
from fastllama.inference.load import load_run
from fastllama.model.llama import Llama
from fastllama.run_folder import RunFolder
from fastllama_kernels import REFERENCE
from tests.runs import losses, rows, train, train_in_child
from tests.sessions import resolved_session
from tests.workspace import Workspace


def test_missing_compiler_is_an_error(
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SystemExit) as stop:
        train(workspace.recipe, "--run-dir", tmp_path / "run", "--training.compile", "true")
    assert stop.value.code == 2
    assert "no-such-compiler" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_run_folder_with_other_options_is_an_error(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(workspace.recipe, "--run-dir", run)
    before = (run / "config.toml").read_bytes()
    with pytest.raises(SystemExit) as stop:
        train(workspace.recipe, "--run-dir", run, "--optimizer.max-lr", 0.02)
    assert stop.value.code == 2
    assert "optimizer.max_lr = 0.01, not 0.02" in capsys.readouterr().err
    assert (run / "config.toml").read_bytes() == before


def test_resume_with_another_identity_is_an_error(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(workspace.recipe, "--run-dir", run)
    changes = {
        "--model.theta": 500_000,
        "--training.seed": 7,
        "--training.tokens-per-update": 512,
    }
    for option, value in changes.items():
        with pytest.raises(SystemExit) as stop:
            train("--resume", run, option, value, "--training.training-tokens", 5120)
        assert stop.value.code == 2
        assert f"with {option[2:].replace('-', '_')} = " in capsys.readouterr().err


def test_locked_new_run_is_an_error(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with locked(run), pytest.raises(SystemExit) as stop:
        train(workspace.recipe, "--run-dir", run)
    assert stop.value.code == 2
    assert "another process is writing into" in capsys.readouterr().err
    assert [path.name for path in run.iterdir()] == [".lock"]


def test_locked_run_is_not_read_or_changed(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(workspace.recipe, "--run-dir", run)
    latest = run / "checkpoints" / "latest"
    latest.unlink()
    latest.symlink_to("step-00000005")
    # Without the lock the command would repair the link, and would report the finished run or the
    # other option.
    for options in ([], ["--optimizer.max-lr", 0.02]):
        with locked(run), pytest.raises(SystemExit) as stop:
            train(workspace.recipe, "--run-dir", run, *options)
        assert stop.value.code == 2
        assert "another process is writing into" in capsys.readouterr().err
    assert latest.resolve().name == "step-00000005"


def test_run_is_locked_while_it_starts(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    train(workspace.recipe, "--run-dir", run)
    longer = ["--training.training-tokens", 20 * 256]
    newest_checkpoint, attempts = setup.newest_checkpoint, []

    def newest_checkpoint_during_attempt(*arguments: Any) -> Any:
        found = newest_checkpoint(*arguments)
        attempts.append(train_in_child("--resume", run, *longer))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(setup, "newest_checkpoint", newest_checkpoint_during_attempt)
        train("--resume", run, "--training.training-tokens", 15 * 256)
    (attempt,) = attempts
    assert attempt.returncode == 2, attempt.stdout
    assert "another process is writing into" in attempt.stderr
    # After the first process has finished, the other one resumes from its last update.
    assert "resuming after update 15 of 20" in train_in_child("--resume", run, *longer).stdout
    assert list(losses(run)) == list(range(1, 21))
    assert not list(run.glob("superseded-*"))


def test_failed_setup_removes_the_folders_it_created(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> Any:
        raise ValueError("there are no such operators")

    monkeypatch.setattr(setup, "choose_operators", fail)
    (tmp_path / "old").mkdir()
    for run in (tmp_path / "runs" / "new", tmp_path / "old"):
        with pytest.raises(SystemExit) as stop:
            train(workspace.recipe, "--run-dir", run)
        assert stop.value.code == 2
    # The folder `old` existed before.
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_ring_is_no_larger_than_the_rest_of_the_run(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_recipe(workspace.recipe)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, prefetch=25))
    depths: list[int] = []
    monkeypatch.setattr(setup, "BatchLoader", lambda *_, depth, **options: depths.append(depth))
    with distributed(config) as world:
        session = resolved_session(config, world, open_dataset(config))
        for step in (0, 3, 7, 9):
            state: Any = SimpleNamespace(progress=TrainProgress(step=step))
            setup.open_loader(session, state)
    n_micro_batches = config.accumulation_steps(1)
    assert depths == [min(25, left * n_micro_batches) for left in (10, 7, 3, 1)]
    assert depths[0] == 25 > depths[-1]


def test_too_large_a_model_leaves_nothing_in_the_way(
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # As in a container, which gets less than the memory of the machine.
    monkeypatch.setattr(fsdp, "refuse_small_host", lambda *arguments: None)
    run = tmp_path / "run"
    for vocab_size in (10**13, 10**18):
        with pytest.raises(SystemExit) as stop:
            train(workspace.recipe, "--run-dir", run, "--model.vocab-size", vocab_size)
        assert stop.value.code == 1
        (message,) = capsys.readouterr().err.splitlines()[-1:]
        assert message.startswith("error: Out of memory while starting: ")
        assert "choose a smaller model, or use more devices." in message
    train(workspace.recipe, "--run-dir", run)
    assert list(losses(run)) == list(range(1, 11))


def test_lack_of_memory_in_an_update_has_the_plan(
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*arguments: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 2")

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "update", fail)
        with pytest.raises(SystemExit) as stop:
            train(workspace.recipe, "--run-dir", run)
    assert stop.value.code == 1
    message = capsys.readouterr().err
    assert "error: Out of memory in update 1: DefaultCPUAllocator: " in message
    assert "The plan per device is 0.0 GiB (parameters 0.0, " in message
    train(workspace.recipe, "--run-dir", run, "--training.batch-size", 1)
    assert list(losses(run)) == list(range(1, 11))


def test_console_reports_the_held_out_split(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    prepare([str(workspace.corpus)], workspace.tokenizer, data)
    train(workspace.recipe, "--run-dir", tmp_path / "run", "--data.path", data)
    printed = capsys.readouterr().out
    no_validation = "nothing held out: no validation (prepare --validation-fraction)"
    assert f"epochs wanted; {no_validation}" in printed
    dataset = open_dataset(load_recipe(workspace.recipe))
    n_tokens = dataset.sources[0].manifest.splits["validation"].tokens
    assert setup.describe_validation(dataset) == f"{n_tokens:,} held out"
    # A split shorter than a sequence is left out.
    too_short = dataclasses.replace(dataset, validation=())
    what = setup.describe_validation(too_short)
    assert what.startswith("less than a sequence held out: no validation")


def log_likelihoods(
    model: Llama, stream: TokenStream, sequences: Iterable[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of every target in float64: log-likelihood, mean log-probability of the vocabulary, log Z."""
    model = model.double()
    model.init_rotary()
    tokens = np.stack([stream.read(index, model.config.max_seq_len) for index in sequences])
    tokens_BT = torch.from_numpy(tokens.astype(np.int64))
    with torch.no_grad():
        logits_BTV = model(tokens_BT[:, :-1])
    log_z_BT = logits_BTV.logsumexp(-1)
    target_BT = logits_BTV.gather(-1, tokens_BT[:, 1:, None]).squeeze(-1)
    return target_BT - log_z_BT, logits_BTV.mean(-1) - log_z_BT, log_z_BT


def test_loss_options(workspace: Workspace, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ["--training.z-loss", 1e-4, "--training.label-smoothing", 0.1]
    train(workspace.recipe, "--run-dir", run, *options, "--model.logit-softcap", 20)
    logged = rows(run)
    assert all(math.isfinite(float(row["loss"])) for row in logged)
    assert float(logged[-1]["loss"]) < float(logged[0]["loss"]) - 0.5

    # Training computes in float32. Each log-likelihood is off by about 1e-6, and the mean of 256 by
    # less, which a relative 1e-6 of a loss between 3 and 6 covers.
    config = RunFolder(run).load_config()
    dataset = open_dataset(config)
    initial = Llama(config.model, REFERENCE)
    initial.init_weights(config.training.seed)
    first_batch = [place.sequence for place in dataset.train.places(range(8), 32)]
    stream = dataset.sources[0].stream
    target, uniform, log_z = log_likelihoods(initial, stream, first_batch)
    expected = -0.9 * target.mean() - 0.1 * uniform.mean() + 1e-4 * log_z.square().mean()
    assert float(logged[0]["loss"]) == pytest.approx(expected.item(), rel=1e-6)

    # Validation measures the plain negative log-likelihood of the first 8 held-out sequences.
    saved = load_run(run, torch.device("cpu")).model
    assert saved.config.logit_softcap == 20
    target, uniform, log_z = log_likelihoods(saved, dataset.validation[0].stream, range(8))
    assert float(logged[-1]["val_loss"]) == pytest.approx(-target.mean().item(), rel=1e-6)
    # Either term of the training loss would change it by far more than the tolerance.
    assert abs(0.1 * (target - uniform).mean()) > 1e-2
    assert 1e-4 * log_z.square().mean() > 1e-3
