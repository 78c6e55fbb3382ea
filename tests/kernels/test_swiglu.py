import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastllama_kernels.swiglu import swiglu_reference
from tests.compare import DTYPES, assert_operator_as_exact_as, randn


def plain(gate_up: Tensor) -> Tensor:
    width = gate_up.shape[-1] // 2
    return F.silu(gate_up[..., :width]) * gate_up[..., width:]


def formula(gate_up: Tensor) -> Tensor:
    width = gate_up.shape[-1] // 2
    gate, up = gate_up[..., :width], gate_up[..., width:]
    return gate / (1 + torch.exp(-gate)) * up


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_its_formula(dtype: torch.dtype) -> None:
    gate_up = 3 * randn(2, 5, 32, seed=0, dtype=dtype)
    assert_operator_as_exact_as(swiglu_reference, plain, formula, [gate_up])


def test_gradients_are_the_slopes() -> None:
    assert torch.autograd.gradcheck(swiglu_reference, [randn(3, 8, seed=0).requires_grad_()])


def test_large_gates_saturate() -> None:
    # exp(1000) overflows, so a naive 1 / (1 + exp(-gate)) would have a NaN slope here.
    gate_up = torch.tensor([-1000.0, 1000.0, 2.0, 2.0], requires_grad=True)
    out = swiglu_reference(gate_up)
    (gradient,) = torch.autograd.grad(out, gate_up, torch.tensor([3.0, 5.0]))
    assert out.tolist() == [0.0, 2000.0]
    assert gradient.tolist() == [0.0, 10.0, 0.0, 5000.0]
