from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fastllama_kernels._library import n_multiprocessors
from fastllama_kernels.rms_norm import (
    add_rms_norm_fwd,
    add_rms_norm_reference,
    programs_per_multiprocessor,
    rms_norm,
    rms_norm_reference,
)
from tests.compare import (
    DEVICE,
    DTYPES,
    KERNEL_DTYPES,
    Operator,
    assert_operator_as_exact_as,
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
    EPS,
    WITHOUT_RESIDUAL,
    Case,
    D,
    E,
    add_rms_norm_case,
    add_rms_norm_linear_case,
    assert_exact_on,
    forward,
    forward_and_saved,
    rms_norm_case,
)

FLOAT32, BFLOAT16, FLOAT16 = KERNEL_DTYPES

# One program takes every row modulo this number.
PROGRAMS = n_multiprocessors(torch.device(DEVICE)) * programs_per_multiprocessor(D)

# A row of several blocks, forward and backward.
WIDE = 33_000

NORM, ADD, LINEAR = rms_norm_case(), add_rms_norm_case(), add_rms_norm_linear_case()
EVERY_FORM = [NORM, ADD, LINEAR, *WITHOUT_RESIDUAL]

every_form = pytest.mark.parametrize("form", EVERY_FORM, ids=str)
# Together they run every line of the kernels.
two_forms = pytest.mark.parametrize("form", [NORM, LINEAR], ids=str)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def named_inputs(
    form: Case, *leading: int, width: int = D, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    rows = (*leading, width)
    shapes = {"x": rows, "residual": rows, "weight": (width,), "projection": (E, width)}
    return {
        name: randn(*shapes[name], seed=seed, dtype=dtype)
        for seed, name in enumerate(form.shapes(1, 1))
    }


def inputs(form: Case, *leading: int, **options: Any) -> list[Tensor]:
    return list(named_inputs(form, *leading, **options).values())


def formula(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps) * weight


# The reference.


# 0.5 is about the mean square, so that an eps in the wrong place shows.
@pytest.mark.parametrize("eps", [1e-5, 0.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_matches_formula(dtype: torch.dtype, eps: float) -> None:
    assert_operator_as_exact_as(
        lambda x, weight: rms_norm_reference(x, weight, eps),
        lambda x, weight: F.rms_norm(x, (D,), weight, eps),
        lambda x, weight: formula(x, weight, eps),
        [randn(3, 5, D, seed=0, dtype=dtype), randn(D, seed=1, dtype=dtype)],
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_adds_the_residual(dtype: torch.dtype) -> None:
    def plain(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return F.rms_norm(x + residual, (D,), weight, 1e-5), x + residual

    def exact(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return formula(x + residual, weight, 1e-5), x + residual

    shapes = [(4, D), (4, D), (D,)]
    assert_operator_as_exact_as(
        lambda x, residual, weight: add_rms_norm_reference(x, residual, weight, 1e-5),
        plain,
        exact,
        [randn(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)],
    )


def test_reference_of_zeros() -> None:
    x = torch.zeros(D, device=DEVICE, requires_grad=True)
    y = rms_norm_reference(x, torch.ones_like(x), 1e-5)
    (gradient,) = torch.autograd.grad(y, x, randn(D, seed=0, dtype=torch.float32))
    assert not y.any()
    assert gradient.isfinite().all()


def test_reference_squares_in_float32() -> None:
    # 300 squared is more than the largest float16, 65,504.
    x = torch.full((D,), 300.0, dtype=torch.float16)
    torch.testing.assert_close(rms_norm_reference(x, torch.ones_like(x), 1e-5), torch.ones_like(x))


# The kernels: shapes.


@pytest.mark.parametrize("width", [1, 3, 127, 129, 2047, 2049, 5461, 5632, 65_535, 65_537, 100_003])
@two_forms
def test_any_width(form: Case, width: int) -> None:
    assert_exact_on(form, inputs(form, 2 if width < 10_000 else 1, width=width))


@pytest.mark.parametrize("rows", [1, PROGRAMS - 1, PROGRAMS, PROGRAMS + 1, 2 * PROGRAMS + 1])
@two_forms
def test_any_number_of_rows(form: Case, rows: int) -> None:
    assert_exact_on(form, inputs(form, rows))


@pytest.mark.parametrize("width", [9, 2_000])
def test_sums_over_more_programs_than_a_block(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # The interpreter has one multiprocessor.
    module = import_module("fastllama_kernels.rms_norm")
    monkeypatch.setattr(module, "n_multiprocessors", lambda device: 132)
    block = module.dweight_config(width)["BLOCK_PROGRAMS"]
    assert_exact_on(NORM, inputs(NORM, 2 * block + 1, width=width))


@pytest.mark.parametrize("leading", [(), (1,), (2, 1, 2)])
@every_form
def test_any_leading_dimensions(form: Case, leading: tuple[int, ...]) -> None:
    assert_exact_on(form, inputs(form, *leading))


# The kernels: numbers.


def sixteenths(x: Tensor) -> Tensor:
    """Round so that sums are exact in every dtype; their rounding then hides no other error."""
    return (16 * x).round() / 16


@pytest.mark.parametrize(
    ("width", "x", "residual", "weight"),
    [
        (D, BFLOAT16, BFLOAT16, FLOAT32),
        (D, FLOAT16, FLOAT16, FLOAT32),
        (D, FLOAT32, FLOAT32, BFLOAT16),
        (D, BFLOAT16, FLOAT32, BFLOAT16),
        (D, BFLOAT16, FLOAT32, FLOAT32),
        (D, FLOAT32, BFLOAT16, FLOAT32),
        (D, FLOAT16, BFLOAT16, FLOAT16),
        (WIDE, BFLOAT16, FLOAT32, FLOAT32),
        (WIDE, FLOAT16, FLOAT16, FLOAT16),
    ],
    ids=str,
)
@pytest.mark.parametrize("form", [NORM, ADD, LINEAR], ids=str)
def test_mixed_dtypes(
    form: Case, width: int, x: torch.dtype, residual: torch.dtype, weight: torch.dtype
) -> None:
    dtypes = {"x": x, "residual": residual, "weight": weight, "projection": x}
    named = named_inputs(form, 2, width=width)
    assert_exact_on(form, [sixteenths(t).to(dtypes[name]) for name, t in named.items()])


def test_weight_gradient_is_summed_in_float32() -> None:
    x, weight = inputs(NORM, 1)
    # Two programs have one row each; each row's gradient is 64 times the sum of both.
    signs = torch.tensor([[64.0], [-63.0]], device=DEVICE)

    def difference(operator: Operator, dtype: torch.dtype = torch.float32) -> Operator:
        rows = x.to(dtype).expand(2, -1)
        return lambda weight: (signs * operator(rows, weight)).sum(dim=0)

    assert_operator_as_exact_as(
        difference(NORM.triton),
        difference(NORM.reference),
        difference(NORM.reference, torch.float64),
        [weight.bfloat16()],
    )


@pytest.mark.parametrize("eps", [1e-6, 1e-5])
def test_small_eps(eps: float) -> None:
    def with_eps(operator: Callable[..., Tensor]) -> Operator:
        return lambda x, weight: operator(x, weight, eps)

    x, weight = inputs(NORM, 3)
    # The mean square is then about eps.
    assert_operator_as_exact_as(
        with_eps(rms_norm),
        with_eps(rms_norm_reference),
        with_eps(rms_norm_reference),
        [x * eps**0.5, weight],
    )


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@every_form
def test_rows_of_zeros(form: Case, dtype: torch.dtype) -> None:
    assert_exact_on(form, map(torch.zeros_like, inputs(form, 2, dtype=dtype)))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("size", [300.0, 1e4])
def test_squares_beyond_float16(size: float, dtype: torch.dtype) -> None:
    x, weight = inputs(NORM, 2, dtype=dtype)
    assert_exact_on(NORM, [x.sign() * size, weight])


@pytest.mark.parametrize("width", [D, WIDE])
def test_normalises_the_rounded_sum(width: int) -> None:
    x, residual, weight = inputs(ADD, 2, width=width, dtype=torch.bfloat16)
    y, stream = add_rms_norm_fwd(x, residual, weight, EPS)
    wide = stream.double()
    truth = torch.rsqrt(wide.square().mean(dim=-1) + EPS)
    # One rounding to bfloat16; normalising the exact sum would leave two.
    eps = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(
        y.double(), wide * truth[:, None] * weight.double(), rtol=1.01 * eps, atol=0
    )


def test_x_is_its_own_residual() -> None:
    def twice(operator: Operator) -> Operator:
        return lambda x, weight: operator(x, x, weight)

    assert_operator_as_exact_as(
        twice(ADD.triton), twice(ADD.reference), twice(ADD.reference), inputs(NORM, 3)
    )


# The kernels: autograd.


@pytest.mark.parametrize("form", EVERY_FORM[1:], ids=str)
def test_only_the_stream_is_used(form: Case) -> None:
    arguments = form.arguments()
    _, dstream = arguments.upstream
    leaves = arguments.inputs
    _, stream = forward(form.triton, arguments)
    gradients = torch.autograd.grad(stream, list(leaves.values()), dstream, allow_unused=True)
    for name, gradient in zip(leaves, gradients, strict=True):
        if name in ("x", "residual"):
            assert gradient is not None
            assert torch.equal(gradient, dstream)
        else:
            assert gradient is None


@every_form
def test_saves_no_activation_but_the_stream(form: Case) -> None:
    arguments = form.arguments()
    outputs, saved = forward_and_saved(form.triton, arguments)
    stream = outputs[-1] if "residual" in arguments.inputs else arguments.inputs["x"]
    activations = [x for x in saved if x.shape == stream.shape]
    assert [x.data_ptr() for x in activations] == [stream.data_ptr()]


# Errors.


@pytest.mark.parametrize(
    ("form", "name", "shape", "message"),
    [
        (form, name, shape, message)
        for name, shape, message in [
            ("weight", (23,), r"weight has shape \(23,\), .* \(2, 24\), need \(24,\)"),
            ("weight", (1,), r"weight has shape \(1,\), "),
            ("weight", (1, 24), r"weight has shape \(1, 24\), "),
            ("residual", (1, 24), r"residual has shape \(1, 24\) and x \(2, 24\)"),
            ("residual", (24,), r"residual has shape \(24,\) and x \(2, 24\)"),
            ("projection", (7, 23), r"projection has shape \(7, 23\), .* \(out_features, 24\)"),
            ("projection", (24,), r"projection has shape \(24,\), .* \(out_features, 24\)"),
            ("projection", (24, 7), r"projection has shape \(24, 7\), .* \(out_features, 24\)"),
        ]
        for form in EVERY_FORM
        if name in form.shapes(1, 1)
    ],
    ids=str,
)
def test_wrong_shape(form: Case, name: str, shape: tuple[int, ...], message: str) -> None:
    arguments = named_inputs(form, 2)
    arguments[name] = torch.ones(shape, device=DEVICE)
    with pytest.raises(ValueError, match=message):
        form.triton(*arguments.values())


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    form=st.sampled_from(EVERY_FORM),
    leading=st.lists(st.integers(1, 3), min_size=1, max_size=2),
    width=st.integers(1, 70),
    dtypes=st.tuples(*3 * [st.sampled_from(KERNEL_DTYPES)]),
    layout=st.sampled_from([contiguous, transposed, every_other, sliced, misaligned]),
)
def test_any_shape_dtype_and_layout(
    form: Case,
    leading: list[int],
    width: int,
    dtypes: tuple[torch.dtype, ...],
    layout: Layout,
) -> None:
    dtype_of = dict(
        zip(("x", "residual", "weight", "projection"), (*dtypes, dtypes[0]), strict=True)
    )
    named = named_inputs(form, *leading, width=width)
    assert_exact_on(form, [sixteenths(t).to(dtype_of[name]) for name, t in named.items()], layout)
