"""Weight gradients that the backward's matmul adds to a float32 sum, `main_grad`."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_fw_bw_and_get_code

from fastllama_kernels import CPU, REFERENCE, TRITON, Operators, linear
from tests.compare import DEVICE, randn

N, D, F, V = 24, 16, 10, 11
N_MICRO_BATCHES = 3

Call = Callable[[Operators, Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Case:
    """An operator with a matmul, as a function of (operators, x, weight, main_grad)."""

    name: str
    call: Call
    x: tuple[int, ...]
    weight: tuple[int, ...]

    def __str__(self) -> str:
        return self.name


def norm_weight(x: Tensor) -> Tensor:
    return torch.linspace(0.5, 1.5, x.shape[-1], dtype=x.dtype, device=x.device)


def targets(x: Tensor) -> Tensor:
    chosen = torch.arange(len(x), device=x.device) % V
    return torch.where(chosen == 2, -100, chosen)


def add_rms_norm_linear(
    operators: Operators, x: Tensor, weight: Tensor, main_grad: Tensor | None
) -> Tensor:
    return operators.add_rms_norm_linear(x, x + 1, norm_weight(x), 1e-3, weight, main_grad)[0]


CASES = [
    Case("linear", lambda _, *tensors: linear(*tensors), (2, N, D), (F, D)),
    Case("add_rms_norm_linear", add_rms_norm_linear, (2, N, D), (F, D)),
    Case("swiglu_linear", lambda ops, *args: ops.swiglu_linear(*args), (2, N, 2 * F), (D, F)),
    Case(
        "linear_cross_entropy",
        lambda ops, x, weight, main_grad: ops.linear_cross_entropy(
            x, weight, targets(x), z_loss=0.1, main_grad=main_grad
        ),
        (N, D),
        (V, D),
    ),
]
SETS = [REFERENCE, CPU, TRITON]

MATMUL = r"accumulate_matmul_\.default\((\w+),"
WRITES = {(case.name, operators.name): MATMUL for case in CASES for operators in SETS}
"""How generated code writes to the sum, in its second group the name of the sum."""
# The fused losses end their forward with the gradient, and scale it into the sum.
WRITES["linear_cross_entropy", "cpu"] = r"cpp_fused_\w*addcmul\w*\(.*\b(primals_\d+),"
WRITES["linear_cross_entropy", "triton"] = r"add_scaled_\.default\((\w+),"

table = pytest.mark.parametrize(
    ("case", "operators"),
    [
        pytest.param(case, operators, id=f"{case}-{operators.name}")
        for case in CASES
        for operators in SETS
        # The other operators of `CPU` are those of `REFERENCE`.
        if operators is not CPU or case.name == "linear_cross_entropy"
    ],
)


def inputs(
    case: Case, operators: Operators, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor, Tensor]:
    """An x for each micro-batch, the weight, and a sum of zeros."""
    device = "cpu" if operators is CPU else DEVICE
    xs = [randn(*case.x, seed=i, dtype=dtype, device=device) for i in range(N_MICRO_BATCHES)]
    weight = randn(*case.weight, seed=9, dtype=dtype, device=device)
    return xs, weight.requires_grad_(), torch.zeros(case.weight, device=device)


def backward(
    case: Case, operators: Operators, x: Tensor, weight: Tensor, main_grad: Tensor | None
) -> Tensor:
    """Run forward and backward; return the gradient of x."""
    leaf = x.detach().requires_grad_()
    out = case.call(operators, leaf, weight, main_grad)
    # Rounded to bfloat16 first, so that every dtype gets the same numbers.
    out.backward(randn(*out.shape, seed=8, dtype=torch.bfloat16).to(out.dtype))
    assert leaf.grad is not None
    return leaf.grad


@table
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sum_is_closer_to_float64_than_fsdp2s(
    case: Case, operators: Operators, dtype: torch.dtype
) -> None:
    xs, weight, main_grad = inputs(case, operators, dtype)
    exact = weight.detach().double().requires_grad_()
    summed = torch.zeros_like(main_grad)
    for x in xs:
        plain = backward(case, operators, x, weight, None)
        assert weight.grad is not None
        # As FSDP2 does: each gradient is rounded to the dtype, then added in float32.
        summed += weight.grad
        weight.grad = None
        dx = backward(case, operators, x, weight, main_grad)
        assert weight.grad is None
        assert torch.equal(dx, plain)
        backward(case, REFERENCE, x.double(), exact, None)
    assert exact.grad is not None
    error, before = ((total - exact.grad).norm() for total in (main_grad, summed))
    # In float32 both sum the same numbers, in another order. In bfloat16 what the matmul multiplies
    # is rounded as before, but its result is not.
    assert error <= (2 if dtype == torch.float32 else 0.95) * before


@table
def test_adds_to_what_is_there(case: Case, operators: Operators) -> None:
    (x, *_), weight, from_zero = inputs(case, operators, torch.float32)
    from_one = torch.ones_like(from_zero)
    for main_grad in (from_zero, from_one):
        backward(case, operators, x, weight, main_grad)
    torch.testing.assert_close(from_one, from_zero + 1)


@table
def test_frozen_weight_adds_nothing(case: Case, operators: Operators) -> None:
    (x, *_), weight, main_grad = inputs(case, operators, torch.float32)
    weight.requires_grad_(False)
    backward(case, operators, x, weight, main_grad)
    assert not main_grad.any()


@table
@pytest.mark.filterwarnings("ignore")
def test_compiled_sum_is_written_in_place(case: Case, operators: Operators) -> None:
    (x, *_), weight, main_grad = inputs(case, operators, torch.bfloat16)
    expected = torch.zeros_like(main_grad)
    case.call(operators, x, weight, expected).sum().backward()
    torch._dynamo.reset()
    compiled = torch.compile(case.call, fullgraph=True, dynamic=False)
    # A cached graph has no source.
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        _, (_, source) = run_fw_bw_and_get_code(lambda: compiled(operators, x, weight, main_grad))
    # Inductor rounds to bfloat16 in fewer places.
    assert (main_grad - expected).norm() < 1e-2 * expected.norm()
    # The sum is an argument of the graph, and nothing but the operator touches it.
    (name,) = set(re.findall(WRITES[case.name, operators.name], source))
    assert name.startswith("primals_")
    uses = [line for line in source.splitlines() if re.search(rf"[(,]\s*{name}\b", line)]
    uses = [line for line in uses if not re.search("assert_size_stride|primals.*=|return", line)]
    assert len(uses) == 1, uses
