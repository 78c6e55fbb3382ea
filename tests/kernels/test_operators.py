import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastllama.config import ModelConfig
from fastllama.model.llama import Llama
from fastllama_kernels import REFERENCE

CONFIG = ModelConfig(vocab_size=32, n_embd=16, n_layers=3, n_heads=2, multiple_of=16, max_seq_len=8)


def test_the_kernels_know_nothing_of_the_trainer() -> None:
    # In a process of its own: this one has imported the trainer already.
    code = "import fastllama_kernels, sys; print(*sys.modules, sep='\\n')"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    modules = result.stdout.split()
    assert "fastllama_kernels.operators" in modules
    assert [name for name in modules if name.split(".")[0] == "fastllama"] == []


def test_replacing_an_operator_is_an_ablation() -> None:
    calls = []

    def unmasked(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        calls.append(q.shape)
        return REFERENCE.attention(q, k, v, causal=False, **options)

    tokens = torch.arange(8).reshape(1, 8)
    logits = []
    for operators in (REFERENCE, dataclasses.replace(REFERENCE, attention=unmasked)):
        model = Llama(CONFIG, operators)
        model.init_weights(seed=0)
        logits.append(model(tokens))
    assert len(calls) == CONFIG.n_layers
    assert not torch.allclose(*logits)


def test_the_list_of_failures_names_tests_there_are() -> None:
    folder = Path(__file__).parent
    there = "\n".join(path.read_text() for path in folder.glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", (folder.parents[1] / "kernels" / "README.md").read_text())
    assert len(named) > 60
    assert [name for name in named if f"def {name}(" not in there] == []
