"""A new run from the weights of another one: `training.init_from`."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers.processors import TemplateProcessing

from fastllama.data.prepare import prepare
from fastllama.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from tests.runs import losses, rows, train
from tests.workspace import Workspace

STEP_5, STEP_10 = "step-00000005", "step-00000010"
NO_UPDATE = ["--optimizer.max-lr", 1e-30, "--optimizer.min-lr", 0, "--optimizer.weight-decay", 0]


@pytest.fixture(scope="module")
def source(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 10 updates with checkpoints after 5 and 10."""
    run = tmp_path_factory.mktemp("source") / "run"
    train(workspace.recipe, "--run-dir", run)
    return run


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    found = {}
    for shard in checkpoint.glob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("name", ["", f"checkpoints/{STEP_5}", "checkpoints/latest"])
def test_weights_are_those_of_the_source(
    name: str, source: Path, workspace: Workspace, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(workspace.recipe, "--run-dir", run, "--training.init-from", source / name, *NO_UPDATE)
    expected = tensors(source / "checkpoints" / (STEP_5 if STEP_5 in name else STEP_10))
    found = tensors(run / "checkpoints" / STEP_10)
    for key in expected:
        if key.startswith("model."):
            assert torch.equal(found[key], expected[key]), key
    # Schedule, counters and data begin anew.
    assert [row["step"] for row in rows(run)] == [str(step) for step in range(1, 11)]
    assert float(rows(run)[0]["lr"]) < float(rows(run)[4]["lr"])


@pytest.mark.parametrize("moments", [False, True])
def test_moments_are_taken_only_if_asked(
    moments: bool, source: Path, workspace: Workspace, tmp_path: Path
) -> None:
    options = ["--training.init-from", source, "--training.init-moments", str(moments).lower()]
    train(workspace.recipe, "--run-dir", tmp_path / "run", *options, *NO_UPDATE)
    found = tensors(tmp_path / "run" / "checkpoints" / STEP_10)
    # AdamW counts its own updates, for the bias of the moments.
    (steps,) = {float(found[name]) for name in found if name.startswith("optimizer.step.")}
    assert steps == (20 if moments else 10)


def test_resumed_run_needs_the_source_no_more(
    source: Path, workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone, run = tmp_path / "gone", tmp_path / "run"
    shutil.copytree(source, gone, symlinks=True)
    train(workspace.recipe, "--run-dir", run, "--training.init-from", gone)
    printed = capsys.readouterr().out
    assert f"weights {gone / 'checkpoints' / STEP_10}\n" in printed
    whole = losses(run)
    shutil.rmtree(gone)
    train("--resume", run / "checkpoints" / STEP_5)
    assert losses(run) == whole
    assert "weights " not in capsys.readouterr().out


def test_template_of_the_tokenizer_may_differ(
    source: Path, workspace: Workspace, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(source, copy, symlinks=True)
    tokenizer = load_tokenizer(copy / "tokenizer.json")
    end = tokenizer.id_to_token(1)
    tokenizer.post_processor = TemplateProcessing(single=f"{end} $A", special_tokens=[(end, 1)])
    before = (copy / "tokenizer.json").read_text()
    tokenizer.save(str(copy / "tokenizer.json"))
    assert (copy / "tokenizer.json").read_text() != before
    train(workspace.recipe, "--run-dir", tmp_path / "run", "--training.init-from", copy)
    assert len(losses(tmp_path / "run")) == 10


def test_context_and_rotary_base_may_differ(
    source: Path, workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model.max-seq-len", 64, "--model.theta", 50000]
    train(workspace.recipe, "--run-dir", tmp_path / "run", "--training.init-from", source, *options)
    assert (
        f"weights {source / 'checkpoints' / STEP_10}; model.max_seq_len = 64 instead of 32; "
        "model.theta = 50000.0 instead of 10000.0\n"
    ) in capsys.readouterr().out


def test_weights_that_do_not_fit_are_refused(
    source: Path, workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged, bare = tmp_path / "damaged", tmp_path / "bare"
    for copy in (damaged, bare):
        shutil.copytree(source, copy, symlinks=True)
    for shard in damaged.glob("checkpoints/step-*/*.safetensors"):
        shard.write_bytes(b"")
    shutil.rmtree(bare / "checkpoints")
    other = tmp_path / "other"
    other.mkdir()
    save_tokenizer(train_tokenizer(["another text"], 270), other / "tokenizer.json")
    prepare([str(workspace.corpus)], other / "tokenizer.json", other / "data")
    newest = source / "checkpoints" / STEP_10
    cases = {
        (source, "--model.n-embd", 64): f"The weights of {newest} have model.n_embd = 32, and this "
        "run has 64; set --model.n-embd 32.",
        (source, "--model.n-kv-heads", 4): "have model.n_kv_heads = 2, and this run has 4; set",
        (source, "--model.ffn-hidden", 48): "model.ffn_hidden = 96, and this run has 48; set",
        (source, "--data.path", other / "data"): "belong to another tokenizer than the data "
        f"{other / 'data'}; prepare the data with {source / 'tokenizer.json'}.",
        (damaged,): f"{damaged} has no whole checkpoint: ",
        (damaged / "checkpoints" / STEP_5,): "The checkpoint is damaged: ",
        (bare,): f"{bare} has no checkpoint yet; train on, or wait for the first.",
        (source / "checkpoints",): f"or start from it with --training.init-from {source}.",
        (source / "config.toml",): f"or start from it with --training.init-from {source}.",
        (tmp_path,): f"training.init_from: {tmp_path} has no config.json",
        (tmp_path / "gone",): f"training.init_from: There is no folder {tmp_path / 'gone'}",
    }
    run = tmp_path / "run"
    for (path, *options), expected in cases.items():
        with pytest.raises(SystemExit) as stop:
            train(workspace.recipe, "--run-dir", run, "--training.init-from", path, *options)
        assert stop.value.code == 2
        assert expected in capsys.readouterr().err
        assert not run.exists()
