"""The names of tensors in a checkpoint."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastllama.checkpoints.reading import load_tensors
from fastllama.checkpoints.state import checkpoint_name, training_tensors
from fastllama.cli import main
from fastllama.config import ModelConfig, OptimizerConfig
from fastllama.model.llama import Llama
from fastllama.optim.adamw import build_optimizer
from fastllama_kernels import REFERENCE
from tests.runs import train
from tests.workspace import Workspace

MODEL = ModelConfig(vocab_size=16, n_embd=8, n_layers=2, n_heads=2, multiple_of=4, max_seq_len=8)
# In the order of the model's parameters. Names on disk must not change when a module moves.
NAMES = [
    "embedding.weight",
    "blocks.0.attention_norm.weight",
    "blocks.0.attention.qkv.weight",
    "blocks.0.attention.output.weight",
    "blocks.0.mlp_norm.weight",
    "blocks.0.mlp.gate_up.weight",
    "blocks.0.mlp.down.weight",
    "blocks.1.attention_norm.weight",
    "blocks.1.attention.qkv.weight",
    "blocks.1.attention.output.weight",
    "blocks.1.mlp_norm.weight",
    "blocks.1.mlp.gate_up.weight",
    "blocks.1.mlp.down.weight",
    "norm.weight",
    "output.weight",
]


def test_names_on_disk_load(tmp_path: Path) -> None:
    """Norms were modules of the block, `attention_norm` and `mlp_norm`, before they moved."""
    model = Llama(MODEL, REFERENCE)
    optimizer = build_optimizer(model, OptimizerConfig())
    generator = torch.Generator().manual_seed(0)
    saved: dict[str, Tensor] = {}
    for name, weight in zip(NAMES, model.parameters(), strict=True):
        for prefix in ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq"):
            saved[f"{prefix}.{name}"] = torch.randn(weight.shape, generator=generator)
        saved[f"optimizer.step.{name}"] = torch.randn((), generator=generator)
    save_file(saved, tmp_path / "shard-00001-model-00001-of-00001.safetensors")

    tensors = training_tensors(model, optimizer)
    assert tensors.keys() == saved.keys()
    load_tensors(tmp_path, tensors)
    for name, weight in zip(NAMES, model.parameters(), strict=True):
        assert torch.equal(weight, saved[f"model.{name}"]), name
        for key, value in optimizer.state[weight].items():
            assert torch.equal(value, saved[f"optimizer.{key}.{name}"]), (key, name)


def test_docs_name_every_weight() -> None:
    with torch.device("meta"):
        model = Llama(dataclasses.replace(MODEL, n_layers=1), REFERENCE)
    page = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
    table = page.partition("| `model.…` |")[2]
    documented = set(re.findall(r"^\| `([\w.]+)`", table, re.MULTILINE))
    names = (checkpoint_name(name) for name, _ in model.named_parameters())
    assert documented == {name.replace("blocks.0.", "blocks.N.") for name in names}


def test_tied_embedding_is_saved_once_and_loads(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The run's parent is called checkpoints too, which must not confuse `generate`.
    run = tmp_path / "checkpoints" / "tied"
    train(workspace.recipe, "--run-dir", run, "--model.tied-embeddings", "true")
    (shard,) = (run / "checkpoints" / "latest").glob("*.safetensors")
    with safe_open(str(shard), framework="pt") as tensors:
        names = set(tensors.keys())
    assert "model.embedding.weight" in names
    assert "model.output.weight" not in names
    capsys.readouterr()
    main(["generate", str(run), "--prompt", "def", "--max-new-tokens", "4"])
    assert capsys.readouterr().out.startswith("def")
