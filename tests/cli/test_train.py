"""`fastllama train`: mistakes in options, recipes and data, and what a run prints."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import fastllama.train as trainer
from fastllama.cli import main
from fastllama.cli.errors import FAILED, STOPPED
from fastllama.config import Config
from fastllama.data.tokenizer import save_tokenizer, train_tokenizer
from fastllama.run_folder import RunFolder
from tests.cli.refusal import refusal
from tests.workspace import Workspace

OPTIONS = {
    "heads": ("--model.n-heads 5", "model.n_heads = 5 does not divide model.n_embd = 32"),
    "odd head": ("--model.n-heads 32 --model.n-kv-heads 32", "= 1 is odd"),
    "kv heads": ("--model.n-kv-heads 3", "3 does not divide model.n_heads = 4"),
    "tokens per update": ("--training.tokens-per-update 300", "the nearest that is: 320"),
    "learning rates": ("--optimizer.min-lr 0.5", "min_lr = 0.5 is greater than optimizer.max_lr"),
    "vocabulary": ("--model.vocab-size 100", "smaller than the tokenizer's"),
    "sequence": (
        "--model.max-seq-len 32768 --training.tokens-per-update 65536 "
        "--training.training-tokens 655360",
        "is longer than the data",
    ),
    "misspelt": ("--model.n-layer 4", "--model.n-layer; did you mean model.n_layers?\n"),
    "misplaced": ("--training.n-layers 4", "did you mean model.n_layers?"),
    "type": (
        "--model.n-layers four",
        "Error parsing --model.n-layers: invalid literal for int() with base 10: 'four'; see",
    ),
    "range": ("--training.batch-size 0", "training.batch_size must be at least 1, not 0"),
    "dropout": ("--model.dropout 1.5", "at least 0 and less than 1, not 1.5"),
    "warm-up": ("--optimizer.warmup-iterations 10", "leaves nothing of the 10 updates"),
    "no data": ("--data.path nowhere", "nowhere does not exist"),
    "no path": ("--data.path=", "data.path is empty"),
    "choice": ("--optimizer.schedule sine", "sine"),
    "sample prompt": ("--logging.sample-prompt " + "x" * 900, "logging.sample_prompt fills the 32"),
    "missing value": ("--model.n-layers", "n-layers"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_wrong_option(
    name: str, workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, expected = OPTIONS[name]
    run = tmp_path / "run"
    message = refusal(capsys, "train", workspace.recipe, "--run-dir", run, *options.split())
    assert expected in message
    assert not run.exists()


def test_no_cuda_device(
    workspace: Workspace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    run = tmp_path / "run"
    options = ["--training.device", "cuda"]
    message = refusal(capsys, "train", workspace.recipe, "--run-dir", run, *options)
    assert "PyTorch sees no GPU here" in message
    assert not run.exists()


RECIPES = {
    "unknown group": ("[modle]\nn_layers = 2", "unknown option modle"),
    "unknown key": ("[model]\nn_layer = 2", "did you mean model.n_layers?"),
    "wrong type": ('[model]\nn_layers = "2"', "model.n_layers must be an integer, not '2'"),
    "not TOML": ("[model\n", "cannot be read as TOML"),
    "circle": ('extends = "recipe.toml"', "extends itself"),
    "no base": ('extends = "gone.toml"', "There is no recipe"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_wrong_recipe(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, expected = RECIPES[name]
    recipe, run = tmp_path / "recipe.toml", tmp_path / "run"
    recipe.write_text(text)
    assert expected in refusal(capsys, "train", recipe, "--run-dir", run)
    assert not run.exists()


def truncate(data: Path) -> None:
    shard = data / "train-00001.npy"
    shard.write_bytes(shard.read_bytes()[:-2])


def widen(data: Path) -> None:
    shard = data / "train-00000.npy"
    np.save(shard, np.load(shard).astype(np.uint32))


def forget_manifest(data: Path) -> None:
    (data / "manifest.json").unlink()


def swap_tokenizer(data: Path) -> None:
    save_tokenizer(train_tokenizer(["another text"], 320), data / "tokenizer.json")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (truncate, "train-00001.npy is damaged"),
        (widen, "train-00000.npy is damaged: found uint32"),
        (forget_manifest, "run the same command again"),
        (swap_tokenizer, "was not prepared with the tokenizer"),
    ],
)
def test_damaged_data(
    damage: Callable[[Path], None],
    expected: str,
    workspace: Workspace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(workspace.data, data)
    damage(data)
    message = refusal(capsys, "train", workspace.recipe, "--run-dir", run, "--data.path", data)
    assert expected in message
    assert not run.exists()


def test_recipe_or_run(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "Give a recipe" in refusal(capsys, "train")
    assert "There is no recipe gone.toml" in refusal(capsys, "train", "gone.toml")
    assert "is not a run folder" in refusal(capsys, "train", "--resume", tmp_path / "gone")
    for resume in (["--resume", "runs/x"], ["--resume=runs/x"]):
        assert "not both" in refusal(capsys, "train", workspace.recipe, *resume)


def test_run_that_has_begun_keeps_its_origin(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    main(["train", str(workspace.recipe), "--run-dir", str(run)])
    before = (run / "config.toml").read_bytes()
    capsys.readouterr()
    for option in ("--training.init-from=runs/x", "--training.init-moments=true"):
        message = refusal(capsys, "train", "--resume", run, option)
        assert f"is for a new run, and {run} has checkpoints; leave it out" in message
    assert (run / "config.toml").read_bytes() == before
    shutil.rmtree(run / "checkpoints")
    message = refusal(capsys, "train", "--resume", run, "--training.init-from", tmp_path / "gone")
    assert "training.init_from" in message
    assert "is for a new run" not in message


def test_console_neither_wraps_nor_reads_markup(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "[bold]12[/bold] " + 30 * "words "

    def train(config: Config, run: RunFolder, console: Console, **options: Any) -> bool:
        console.print(text)
        return False

    monkeypatch.setattr("fastllama.train.train", train)
    run = "runs/[red] :heart: $A" + 20 * "x y"
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    with pytest.raises(SystemExit) as stop:
        main(["train", str(workspace.recipe), "--run-dir", run])
    for number, handler in before.items():
        signal.signal(number, handler)
    assert stop.value.code == STOPPED
    printed, last = capsys.readouterr().out.splitlines()
    assert printed == text
    # Quoted, so that a shell reads the name as it is.
    assert last.endswith(f"fastllama train --resume '{run}'")


def test_shard_truncated_while_training(
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, run, real = tmp_path / "data", tmp_path / "run", trainer.update
    shutil.copytree(workspace.data, data)

    def update(*args: Any) -> Any:
        for shard in data.glob("train-*.npy"):
            os.truncate(shard, 128)
        return real(*args)

    monkeypatch.setattr(trainer, "update", update)
    with pytest.raises(SystemExit) as stop:
        main(["train", str(workspace.recipe), "--run-dir", str(run), "--data.path", str(data)])
    assert stop.value.code == FAILED
    error = capsys.readouterr().err
    assert error.startswith(f"error: {data}/train-0000")
    assert error.endswith("restore the file and run the same command again\n")


def test_model_larger_than_the_machine(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--training.device", "cpu", "--model.n-layers", "1000000000000")
    message = refusal(capsys, "train", workspace.recipe, "--run-dir", tmp_path / "run", *options)
    assert "On CPUs, the weights and AdamW's moments alone need " in message
    assert not (tmp_path / "run").exists()
    main(["train", str(workspace.recipe), "--print-config", *options])
    assert "# memory                 On CPUs, the weights and AdamW's" in capsys.readouterr().out


def test_print_config_needs_no_data(capsys: pytest.CaptureFixture[str]) -> None:
    configs = Path(__file__).parents[2] / "configs"
    main(["train", str(configs / "llama-1b.toml"), "--print-config", "--model.n_kv_heads", "8"])
    printed = capsys.readouterr().out
    assert "n_kv_heads = 8" in printed
    assert "beta2 = 0.95" in printed
    assert "# feed-forward width     5632" in printed


@pytest.mark.parametrize(
    ("given", "count"), [({}, "3000"), ({"GOMP_SPINCOUNT": "77"}, "77")], ids=["ours", "theirs"]
)
def test_threads_sleep_soon_when_they_wait(
    given: dict[str, str], count: str, tmp_path: Path
) -> None:
    environment = {name: value for name, value in os.environ.items() if "OMP" not in name}
    # A command that loads PyTorch before it fails.
    done = subprocess.run(
        [sys.executable, "-m", "fastllama", "generate", "nothing"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={
            **environment,
            **given,
            "OMP_DISPLAY_ENV": "verbose",
            "PYTHONPATH": ":".join(sys.path),
        },
    )
    assert done.returncode == 2
    assert f"GOMP_SPINCOUNT = '{count}'" in done.stderr
