"""Loading a trained model: which checkpoint, and what is said about it."""

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastllama.inference.load as module
from fastllama import atomic
from fastllama.checkpoints import reading
from fastllama.checkpoints.state import model_tensors
from fastllama.cli import main
from fastllama.config import Config
from fastllama.data.tokenizer import save_tokenizer, train_tokenizer
from fastllama.inference.load import LoadedRun, load_run
from fastllama.model.llama import Llama
from fastllama_kernels.attention import attention_without_cudnn
from tests.runs import train
from tests.workspace import Workspace

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained_run(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with the checkpoints of updates 5 and 10; do not change it."""
    run = tmp_path_factory.mktemp("runs") / "run"
    train(workspace.recipe, "--run-dir", run)
    return run


@pytest.fixture
def run(trained_run: Path, tmp_path: Path) -> Path:
    """A copy of `trained_run`, to damage."""
    shutil.copytree(trained_run, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def nothing_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what this process has reported."""
    monkeypatch.setattr(atomic, "_reported", set())


def equal(one: LoadedRun, other: LoadedRun) -> bool:
    """Whether two models have the same weights."""
    ours, theirs = model_tensors(one.model), model_tensors(other.model)
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def shard_of(checkpoint: Path) -> Path:
    """The one file with tensors of a checkpoint."""
    (shard,) = checkpoint.glob("*.safetensors")
    return shard


@pytest.mark.parametrize("path", ["/", "/nowhere", "nowhere"])
def test_error_for_a_path_without_a_run(path: str) -> None:
    with pytest.raises(ValueError, match=f"{path} is not a run folder"):
        load_run(Path(path), CPU)


def test_unused_newer_checkpoint_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    older, newest = (run / "checkpoints" / f"step-{step:08d}" for step in (5, 10))
    expected = load_run(older, CPU)
    assert capsys.readouterr().err == ""
    os.truncate(shard_of(newest), 100)
    assert equal(load_run(run, CPU), expected)
    assert capsys.readouterr().err.splitlines() == [
        f"Not using a checkpoint: {shard_of(newest)} is not what was written.",
        f"Using {older}.",
    ]


def test_error_without_a_whole_checkpoint(run: Path) -> None:
    for checkpoint in (run / "checkpoints").glob("step-*"):
        (checkpoint / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"no whole checkpoint: .*step-00000010/manifest.json"):
        load_run(run, CPU)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ValueError, match="has no checkpoint yet; train on, or wait for the first"):
        load_run(run, CPU)


@pytest.mark.parametrize(
    ("option", "old", "new"),
    [
        ("theta", "10000.0", "20.0"),
        ("n_layers", "2", "1"),
        ("n_heads", "4", "8"),
        ("eps", "1e-05", "0.1"),
        ("max_seq_len", "32", "64"),
        ("tied_embeddings", "false", "true"),
    ],
)
def test_other_options_than_the_checkpoint(
    run: Path, option: str, old: str, new: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run / "config.toml"
    text = config.read_text()
    assert f"\n{option} = {old}\n" in text
    config.write_text(text.replace(f"\n{option} = {old}\n", f"\n{option} = {new}\n"))
    newest = run / "checkpoints" / "step-00000010"
    for path in (run, newest):
        with pytest.raises(SystemExit) as stop:
            main(["generate", str(path), "--prompt", "def", "--max-new-tokens", "4"])
        assert stop.value.code == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert f"{newest} was trained with model.{option} = " in printed.err
        assert f"restore that value in {config}." in printed.err


def test_softcap_that_the_checkpoint_lacks(run: Path) -> None:
    config = run / "config.toml"
    config.write_text(config.read_text().replace("[model]\n", "[model]\nlogit_softcap = 20.0\n"))
    with pytest.raises(ValueError, match=r"was trained with model.logit_softcap = None, not 20"):
        load_run(run, CPU)


def test_generation_starts_without_the_compiler() -> None:
    # Importing PyTorch's compiler takes longer than loading a small model.
    code = """
import sys, torch
from fastllama.config import Config
from fastllama.inference.load import _build
_build(Config(), torch.device("meta"), torch.float32)
sys.exit("torch._dynamo" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_generation_on_cuda_never_uses_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    # The weights stay on the meta device, since there may be no GPU.
    monkeypatch.setattr(Llama, "to_empty", lambda model, device: model)
    model = module._build(Config(), torch.device("cuda"), torch.bfloat16)
    attention = {block.attention.operators.attention for block in model.blocks}
    assert attention == {attention_without_cudnn}


@pytest.mark.parametrize(
    ("asked", "trained_in", "faster", "expected"),
    [
        ("auto", "bfloat16", "bfloat16", torch.bfloat16),
        ("auto", "auto", "bfloat16", torch.bfloat16),
        ("auto", "bfloat16", "float32", torch.float32),
        ("auto", "float32", "bfloat16", torch.float32),
        ("float32", "bfloat16", "bfloat16", torch.float32),
        ("bfloat16", "float32", "float32", torch.bfloat16),
    ],
)
def test_dtype(
    asked: str,
    trained_in: str,
    faster: str,
    expected: torch.dtype,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = run / "config.toml"
    text, n = re.subn(r'\ndtype = ".*"\n', f'\ndtype = "{trained_in}"\n', config.read_text())
    assert n == 1
    config.write_text(text)
    monkeypatch.setattr(module, "faster_dtype", lambda device: faster)
    loaded = load_run(run, CPU, dtype=asked)  # type: ignore[arg-type]
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {expected}
    assert loaded.model.cos_PR.dtype == torch.float32
    exact = load_run(run, CPU).model.state_dict()
    for name, weight in loaded.model.state_dict().items():
        assert torch.equal(weight, exact[name].to(expected))


def test_dropout_may_differ(run: Path) -> None:
    config = run / "config.toml"
    config.write_text(re.sub(r"\ndropout = .*\n", "\ndropout = 0.5\n", config.read_text()))
    load_run(run, CPU)


@pytest.mark.parametrize("value", [-1, 320, "1", True, None])
def test_end_token_outside_of_the_vocabulary(
    run: Path, monkeypatch: pytest.MonkeyPatch, value: Any
) -> None:
    original = reading.read_identity
    changed = {"data.end_token_id": value}
    monkeypatch.setattr(reading, "read_identity", lambda path: original(path) | changed)
    with pytest.raises(ValueError, match=r"progress.json: data.end_token_id = .* is not one of"):
        load_run(run, CPU)


def test_tokenizer_of_another_run(run: Path) -> None:
    words = ["".join(pair) for pair in itertools.product("abcdefghij", repeat=2)] * 2
    save_tokenizer(train_tokenizer(words, 340), run / "tokenizer.json")
    with pytest.raises(ValueError, match=r"tokenizer.json has 340 token ids and the model 320"):
        load_run(run, CPU)


@pytest.mark.parametrize("how", ["link", "text file", "link elsewhere"])
def test_latest_given_as_a_checkpoint(run: Path, tmp_path: Path, how: str) -> None:
    expected = load_run(run, CPU)
    path = run / "checkpoints" / "latest"
    if how == "text file":
        path.unlink()
        path.write_text("step-00000010\n")
    elif how == "link elsewhere":
        path = tmp_path / "best"
        path.symlink_to(run / "checkpoints" / "step-00000010")
    assert equal(load_run(path, CPU), expected)


def test_linked_checkpoint(run: Path, tmp_path: Path) -> None:
    expected = load_run(run, CPU)
    newest = run / "checkpoints" / "step-00000010"
    shutil.move(newest, tmp_path / "disk")
    newest.symlink_to(tmp_path / "disk")
    for path in (run, newest):
        assert equal(load_run(path, CPU), expected)


def test_checkpoint_removed_by_a_training_is_not_missed(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints, original = run / "checkpoints", module.load_tensors
    expected, n_loads = load_run(run, CPU), 0

    def load_tensors(path: Path, tensors: Any) -> None:
        nonlocal n_loads
        n_loads += 1
        if n_loads < module.ATTEMPTS:
            # A training with keep_last = 1 saves its next checkpoint.
            later = checkpoints / f"step-{10 + n_loads:08d}"
            shutil.copytree(checkpoints / path.name, later)
            for older in checkpoints.glob("step-*"):
                if older < later:
                    shutil.rmtree(older)
        original(path, tensors)

    monkeypatch.setattr(module, "load_tensors", load_tensors)
    assert equal(load_run(run, CPU), expected)
    assert n_loads == module.ATTEMPTS
    assert capsys.readouterr().err == ""


def test_removal_leaves_no_old_permanent_checkpoint(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints, original = run / "checkpoints", module.newest_checkpoint
    expected, n_listed = load_run(run, CPU), 0

    def newest_checkpoint(*arguments: Any) -> Any:
        nonlocal n_listed
        n_listed += 1
        if n_listed == 1:
            # Listed, then removed; the permanent checkpoint of update 5 stays.
            os.rename(checkpoints / "step-00000010", checkpoints / "step-00000011")
            listed = [checkpoints / "step-00000010", checkpoints / "step-00000005"]
            with monkeypatch.context() as patch:
                path = "fastllama.checkpoints.reading.complete_checkpoints"
                patch.setattr(path, lambda folder: listed)
                return original(*arguments)
        return original(*arguments)

    monkeypatch.setattr(module, "newest_checkpoint", newest_checkpoint)
    assert equal(load_run(run, CPU), expected)
    assert n_listed == 2
    assert capsys.readouterr().err == ""


def test_lack_of_memory_is_a_sentence(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(module, "_build", fail)
    message = r"Out of memory while loading .*step-00000010: the model has [\d,]+ parameters"
    with pytest.raises(ValueError, match=message):
        load_run(run, CPU)
