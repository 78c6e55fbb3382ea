import dataclasses
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama.config import ModelConfig
from fastllama.model.llama import Llama
from fastllama_kernels import REFERENCE, TRITON, TRITON_SAVING
from tests.compare import KERNEL_DTYPES
from tests.kernels.operator_cases import (
    CASES,
    FFN,
    B,
    Case,
    D,
    T,
    backward,
    forward_and_saved,
)

# The module of an operator that recomputes, and the width of what it recomputes.
SAVING = {"add_rms_norm_linear": ("rms_norm", D), "swiglu_linear": ("swiglu", FFN)}
CONFIG = ModelConfig(vocab_size=32, n_embd=16, n_layers=3, n_heads=2, multiple_of=16, max_seq_len=8)


def test_kernels_do_not_import_the_trainer() -> None:
    # In its own process, because this one has imported the trainer.
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


def test_replace_one_operator() -> None:
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


def test_readme_names_existing_tests() -> None:
    folder = Path(__file__).parent
    text = (folder.parents[1] / "kernels" / "README.md").read_text()
    # "rms_norm, swiglu `test_a`, `test_b`" means both tests in both files.
    clauses = re.findall(r"((?:\w+, )*\w+) ((?:`test_\w+`(?:, )?)+)", text)
    named = [
        (file, test)
        for files, tests in clauses
        for file in files.split(", ")
        for test in re.findall(r"`(\w+)`", tests)
    ]
    assert len({test for _, test in named}) == len(set(re.findall(r"`(test_\w+)`", text))) > 60
    sources = {path.stem: path.read_text() for path in folder.glob("test_*.py")}
    assert [
        (file, test)
        for file, test in named
        if f"def {test}(" not in sources.get(f"test_{file}", "")
    ] == []


@pytest.mark.parametrize("case", [case for case in CASES if case.name in SAVING], ids=str)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_saved_inputs_of_projections_change_no_bit(
    case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = case.arguments(dtype=dtype)
    operators = (TRITON, TRITON_SAVING)
    calls = [partial(case.call, one) for one in operators]
    recomputing, saving = (forward_and_saved(call, arguments) for call in calls)
    expected = [*recomputing[0], *backward(recomputing[0], arguments)]
    # What is saved on top is the input of the projection.
    module, width = SAVING[case.name]
    more = sum(x.nbytes for x in saving[1]) - sum(x.nbytes for x in recomputing[1])
    assert more == B * T * width * dtype.itemsize
    monkeypatch.delattr(sys.modules[f"fastllama_kernels.{module}"], f"{module}_recompute_bwd")
    results = [*saving[0], *backward(saving[0], arguments)]
    assert all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))
