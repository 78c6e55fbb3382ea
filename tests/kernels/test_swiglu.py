import math
import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fastllama_kernels.swiglu import swiglu, swiglu_cpu, swiglu_linear, swiglu_reference
from tests.compare import (
    DEVICE,
    DTYPES,
    KERNEL_DTYPES,
    assert_operator_as_exact_as,
    outputs_and_gradients,
    randn,
)
from tests.kernels.layouts import (
    Layout,
    contiguous,
    every_other,
    misaligned,
    sliced,
    transposed,
)
from tests.kernels.operator_cases import (
    FFN,
    Case,
    E,
    assert_exact_on,
    forward_and_saved,
    swiglu_case,
    swiglu_linear_case,
)

GATE, LINEAR = swiglu_case(), swiglu_linear_case()

both_forms = pytest.mark.parametrize("form", [GATE, LINEAR], ids=str)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def inputs(
    form: Case, *leading: int, width: int = FFN, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    # Wide enough for gates on which sigmoid is near 0 and 1.
    gate_up = 3 * randn(*leading, 2 * width, seed=0)
    down = randn(E, width, seed=1)
    return [x.to(dtype) for x in (gate_up, down)[: len(form.shapes(1, 1))]]


# The reference.


def plain(gate_up: Tensor) -> Tensor:
    width = gate_up.shape[-1] // 2
    return F.silu(gate_up[..., :width]) * gate_up[..., width:]


def formula(gate_up: Tensor) -> Tensor:
    width = gate_up.shape[-1] // 2
    gate, up = gate_up[..., :width], gate_up[..., width:]
    return gate / (1 + torch.exp(-gate)) * up


@pytest.mark.parametrize("operator", [swiglu_reference, swiglu_cpu])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_matches_formula(
    dtype: torch.dtype, operator: Callable[[Tensor], Tensor]
) -> None:
    gate_up = 3 * randn(2, 5, 32, seed=0, dtype=dtype)
    assert_operator_as_exact_as(operator, plain, formula, [gate_up])


@pytest.mark.parametrize("operator", [swiglu_reference, swiglu_cpu])
def test_reference_of_large_gates(operator: Callable[[Tensor], Tensor]) -> None:
    # exp(1000) overflows: the gradient of a naive 1 / (1 + exp(-gate)) would be NaN.
    gate_up = torch.tensor([-1000.0, 1000.0, 2.0, 2.0], requires_grad=True)
    out = operator(gate_up)
    (gradient,) = torch.autograd.grad(out, gate_up, torch.tensor([3.0, 5.0]))
    assert out.tolist() == [0.0, 2000.0]
    assert gradient.tolist() == [0.0, 10.0, 0.0, 5000.0]


# The kernels.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_once(dtype: torch.dtype) -> None:
    gate_up = inputs(GATE, 3, dtype=dtype)
    truths = outputs_and_gradients(swiglu_reference, [x.double() for x in gate_up])
    for actual, truth in zip(outputs_and_gradients(swiglu, gate_up), truths, strict=True):
        # One rounding, up or down, of a float32 sum whose terms may cancel.
        torch.testing.assert_close(
            actual.double(), truth, rtol=1.01 * torch.finfo(dtype).eps, atol=1e-5
        )


# A program takes at most 1,024 columns.
@pytest.mark.parametrize(
    "width", [1, 2, 3, 127, 129, 1023, 1024, 1025, 2047, 2049, 5461, 5632, 65_537, 100_003]
)
def test_any_width(width: int) -> None:
    assert_exact_on(LINEAR, inputs(LINEAR, 2 if width < 10_000 else 1, width=width))


@pytest.mark.parametrize("rows", [1, 2, 33])
@both_forms
def test_any_number_of_rows(form: Case, rows: int) -> None:
    assert_exact_on(form, inputs(form, rows))


@pytest.mark.parametrize("leading", [(), (1,), (2, 1, 2)])
@both_forms
def test_any_leading_dimensions(form: Case, leading: tuple[int, ...]) -> None:
    assert_exact_on(form, inputs(form, *leading))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@both_forms
def test_rows_of_zeros(form: Case, dtype: torch.dtype) -> None:
    assert_exact_on(form, map(torch.zeros_like, inputs(form, 2, dtype=dtype)))


# Triton's interpreter computes with NumPy, which warns; a GPU does not.
IGNORE_NUMPY = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value) encountered:RuntimeWarning"
)


@IGNORE_NUMPY
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_gates_beyond_the_range_of_exp(dtype: torch.dtype) -> None:
    gates = torch.tensor([-1e4, -1e3, -100, 0, 100, 1e3, 1e4])
    gate_up = torch.stack([gates, torch.full_like(gates, 3)]).flatten()
    assert_exact_on(GATE, [gate_up.to(DEVICE, dtype)])


@IGNORE_NUMPY
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_infinity_and_nan_match_pytorch(dtype: torch.dtype) -> None:
    values = [-math.inf, math.inf, math.nan, -1e4, 0.0, 1e4]
    pairs = torch.tensor([[gate, up] for gate in values for up in values])
    gate_up = [pairs.T.flatten().to(DEVICE, dtype)]
    results = outputs_and_gradients(swiglu, gate_up)
    for actual, expected in zip(results, outputs_and_gradients(plain, gate_up), strict=True):
        finite = expected.isfinite()
        torch.testing.assert_close(actual[~finite], expected[~finite], equal_nan=True)
        assert actual[finite].isfinite().all()


@both_forms
def test_saves_only_its_inputs(form: Case) -> None:
    arguments = form.arguments()
    _, saved = forward_and_saved(form.triton, arguments)
    assert [x.data_ptr() for x in saved] == [x.data_ptr() for x in arguments.inputs.values()]


@both_forms
def test_odd_width_raises(form: Case) -> None:
    gate_up, *down = inputs(form, 2)
    with pytest.raises(ValueError, match=r"gate_up has shape \(2, 47\); .* must be even"):
        form.triton(gate_up[:, 1:], *down)


@pytest.mark.parametrize("shape", [(7, 23), (7, 48), (24,), (24, 7), (2, 7, 24)])
def test_wrong_shape_of_down(shape: tuple[int, ...]) -> None:
    (gate_up,) = inputs(GATE, 2)
    message = rf"down has shape {re.escape(str(shape))}, and needs \(D, 24\)"
    with pytest.raises(ValueError, match=message):
        swiglu_linear(gate_up, torch.ones(shape, device=DEVICE))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    form=st.sampled_from([GATE, LINEAR]),
    leading=st.lists(st.integers(1, 3), min_size=1, max_size=2),
    width=st.integers(1, 70),
    dtype=st.sampled_from(KERNEL_DTYPES),
    layout=st.sampled_from([contiguous, transposed, every_other, sliced, misaligned]),
)
def test_any_shape_dtype_and_layout(
    form: Case, leading: list[int], width: int, dtype: torch.dtype, layout: Layout
) -> None:
    assert_exact_on(form, inputs(form, *leading, width=width, dtype=dtype), layout)
