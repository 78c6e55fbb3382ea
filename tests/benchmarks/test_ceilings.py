"""Ceilings are work over time, and the rates of the bound follow from them."""

from collections.abc import Callable, Sequence

import pytest
import torch

from benchmarks import ceilings
from benchmarks.ceilings import attention_ceilings, gemm_ceilings, measured_rates
from benchmarks.results import Ceiling, Spread
from benchmarks.timing import Call, Timer
from fastllama.config import ModelConfig
from fastllama.planning.flops import matmul_parameters
from fastllama_kernels import REFERENCE
from fastllama_kernels.attention_backends import Attention, Backend


class OneSecond(Timer):
    """Fake timer: runs every call and reports one second for each."""

    kind = "fake"

    def series(self, calls: Sequence[Call]) -> Callable[[], float]:
        def run() -> float:
            return sum(1.0 for call in calls if call() is not None)

        return run


def ceiling(name: str, rate: float, dtype: str = "bfloat16", **shape: int) -> Ceiling:
    return Ceiling(name, "pytorch", shape, dtype, Spread(rate, rate, rate, 3))


ALL = [
    ceiling("copy", 4.0, "uint8", bytes=100),
    ceiling("matmul", 7.0),
    ceiling("matmul", 100.0, "float32"),
    ceiling("gemm qkv forward", 50.0),
    ceiling("attention forward", 2.0, T=1024, K=64),
    ceiling("attention forward", 3.0, T=1024, K=64),
    ceiling("attention backward", 1.0, T=1024, K=64),
]


def test_measured_rates_take_best_bfloat16() -> None:
    rates = measured_rates(ALL)
    assert rates is not None
    assert (rates.matmul, rates.bandwidth) == (7.0, 4.0)
    assert rates.attention == {64: {1024: (3.0, 1.0)}}
    assert rates.source == "measured in the same run"


def test_failing_backend_is_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_backward(name: str) -> Attention:
        def operator(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return REFERENCE.attention(q, k, v).detach().requires_grad_()

        return operator if name == "b" else REFERENCE.attention

    backends = [Backend(name, lambda shape: None, lambda: REFERENCE.attention) for name in "abc"]
    monkeypatch.setattr(ceilings, "BACKENDS", backends)
    monkeypatch.setattr(ceilings, "attention_operator", no_backward)
    found = list(attention_ceilings(OneSecond(), torch.device("cpu"), 64, 8))
    phases = ["attention forward", "attention backward"]
    assert [(one.provider, one.name) for one in found] == [
        (provider, name) for provider in "ac" for name in phases
    ]
    assert "attention b failed, head_dim 64, T 8: RuntimeError" in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["copy", "matmul", "attention forward", "attention backward"])
def test_no_rates_if_one_is_missing(missing: str) -> None:
    assert measured_rates([one for one in ALL if one.name != missing]) is None


def test_gemm_ceilings_cover_the_training_step() -> None:
    model = ModelConfig(vocab_size=48, n_embd=32, n_layers=1, n_heads=4, multiple_of=16)
    found = list(gemm_ceilings(OneSecond(), torch.device("cpu"), model, 8))
    # Every matmul takes one second, so its rate equals its FLOPs.
    assert sum(one.rate.median for one in found) == 6 * 8 * matmul_parameters(model)
