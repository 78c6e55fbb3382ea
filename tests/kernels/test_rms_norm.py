import math
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fastllama_kernels._library import n_multiprocessors
from fastllama_kernels.rms_norm import (
    add_rms_norm,
    add_rms_norm_fwd,
    add_rms_norm_linear,
    add_rms_norm_linear_reference,
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
    outputs_and_gradients,
    randn,
)

WIDTH, OUT = 24, 7

# Of the size of the mean square, so that an eps at another place shows, and so that the gradient
# of a row of one element, which is proportional to eps, is not the rounding of its terms.
EPS = 0.5

FLOAT32, BFLOAT16, FLOAT16 = KERNEL_DTYPES

# One program takes every row modulo this number.
PROGRAMS = n_multiprocessors(torch.device(DEVICE)) * programs_per_multiprocessor(WIDTH)

# A row that is not in registers but in blocks, forward and backward.
BLOCKS = 33_000

Layout = Callable[[Tensor], Tensor]
Outputs = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Form:
    """A public function, as one of its tensors alone that returns a tuple, and its definition."""

    name: str
    operator: Outputs
    reference: Outputs
    inputs: tuple[str, ...]

    def __str__(self) -> str:
        return self.name


def form(operator: Operator, reference: Operator, inputs: str, **fixed: None) -> Form:
    names = tuple(inputs.split())

    def of_tensors(function: Operator) -> Outputs:
        def call(*tensors: Tensor) -> tuple[Tensor, ...]:
            arguments = dict(zip(names, tensors, strict=True))
            outputs = function(**arguments, eps=EPS, **fixed)
            return (outputs,) if isinstance(outputs, Tensor) else outputs

        return call

    name = "-".join([operator.__name__, *(f"no_{argument}" for argument in fixed)])
    return Form(name, of_tensors(operator), of_tensors(reference), names)


NORM = form(rms_norm, rms_norm_reference, "x weight")
ADD = form(add_rms_norm, add_rms_norm_reference, "x residual weight")
START = form(add_rms_norm, add_rms_norm_reference, "x weight", residual=None)
LINEAR = form(add_rms_norm_linear, add_rms_norm_linear_reference, "x residual weight projection")
START_LINEAR = form(
    add_rms_norm_linear, add_rms_norm_linear_reference, "x weight projection", residual=None
)
FORMS = [NORM, ADD, START, LINEAR, START_LINEAR]

every_form = pytest.mark.parametrize("form", FORMS, ids=str)
# Between them every line of the kernels.
two_forms = pytest.mark.parametrize("form", [NORM, LINEAR], ids=str)


def tensors(
    form: Form, *leading: int, width: int = WIDTH, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    rows = (*leading, width)
    shapes = {"x": rows, "residual": rows, "weight": (width,), "projection": (OUT, width)}
    return [randn(*shapes[name], seed=i, dtype=dtype) for i, name in enumerate(form.inputs)]


def leaves_and_upstream(form: Form, *leading: int) -> tuple[list[Tensor], list[Tensor]]:
    leaves = [x.requires_grad_() for x in tensors(form, *leading)]
    with torch.no_grad():
        shapes = [x.shape for x in form.operator(*leaves)]
    return leaves, [
        randn(*shape, seed=10 + i, dtype=torch.float32) for i, shape in enumerate(shapes)
    ]


def step(form: Form, leaves: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients, with nothing copied on the way."""
    outputs = form.operator(*leaves)
    return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]


def assert_exact(form: Form, inputs: list[Tensor]) -> None:
    assert_operator_as_exact_as(form.operator, form.reference, form.reference, inputs)


def assert_exact_in(layout: Layout, form: Form, inputs: list[Tensor]) -> None:
    """The same, with inputs and gradients of the outputs as `layout` puts them in memory."""

    def laid_out(function: Outputs) -> Outputs:
        return lambda *leaves: tuple(map(layout, function(*map(layout, leaves))))

    assert_operator_as_exact_as(
        laid_out(form.operator), laid_out(form.reference), laid_out(form.reference), inputs
    )


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


def formula(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps) * weight


# 0.5 is of the size of the mean square, so that an eps at another place shows.
@pytest.mark.parametrize("eps", [1e-5, 0.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_is_its_formula(dtype: torch.dtype, eps: float) -> None:
    inputs = [randn(3, 5, WIDTH, seed=0, dtype=dtype), randn(WIDTH, seed=1, dtype=dtype)]
    assert_operator_as_exact_as(
        lambda x, weight: rms_norm_reference(x, weight, eps),
        lambda x, weight: F.rms_norm(x, (WIDTH,), weight, eps),
        lambda x, weight: formula(x, weight, eps),
        inputs,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_with_residual_returns_the_sum_too(dtype: torch.dtype) -> None:
    inputs = [randn(4, WIDTH, seed=seed, dtype=dtype) for seed in (0, 1)]
    inputs.append(randn(WIDTH, seed=2, dtype=dtype))
    assert_operator_as_exact_as(
        lambda x, residual, weight: add_rms_norm_reference(x, residual, weight, 1e-5),
        lambda x, residual, weight: (
            F.rms_norm(x + residual, (WIDTH,), weight, 1e-5),
            x + residual,
        ),
        lambda x, residual, weight: (formula(x + residual, weight, 1e-5), x + residual),
        inputs,
    )


def test_gradients_are_the_slopes() -> None:
    inputs = [randn(2, 6, seed=0), randn(2, 6, seed=1), randn(6, seed=2)]
    leaves = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(
        lambda x, residual, weight: add_rms_norm_reference(x, residual, weight, 1e-2), leaves
    )


def test_zeros_stay_zero() -> None:
    x = torch.zeros(WIDTH, device=DEVICE, requires_grad=True)
    y = rms_norm_reference(x, torch.ones_like(x), 1e-5)
    (gradient,) = torch.autograd.grad(y, x, randn(WIDTH, seed=0, dtype=torch.float32))
    assert not y.any()
    assert gradient.isfinite().all()


def test_squares_do_not_overflow_in_float16() -> None:
    # 300 squared is beyond the largest float16, 65504.
    x = torch.full((WIDTH,), 300.0, dtype=torch.float16)
    torch.testing.assert_close(rms_norm_reference(x, torch.ones_like(x), 1e-5), torch.ones_like(x))


# The kernels, from here on.


def sixteenths(x: Tensor) -> Tensor:
    """Numbers whose sums are exact in every type, so that their rounding hides no other."""
    return (16 * x).round() / 16


def transposed(x: Tensor) -> Tensor:
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


def every_other(x: Tensor) -> Tensor:
    return torch.stack([x, x], dim=-1)[..., 0]


def part_of_wider_rows(x: Tensor) -> Tensor:
    return torch.cat([x, x], dim=-1)[..., : x.shape[-1]]


def first_everywhere(x: Tensor) -> Tensor:
    return x[:1].expand_as(x)


def misaligned(x: Tensor) -> Tensor:
    """One element into its memory, so aligned to the element alone, and NaN on both sides."""
    edge = x.new_full((1,), math.nan)
    return torch.cat([edge, x.flatten(), edge])[1:-1].view(x.shape)


# More than a block, so that what is written outside lands there.
FENCE = 40_000


@pytest.fixture
def fences(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What launchers allocate is NaN at first, and lies between numbers that have to stay."""
    memory: list[Tensor] = []
    new_empty = Tensor.new_empty

    def fenced(like: Tensor) -> Tensor:
        memory.append(torch.full((like.numel() + 2 * FENCE,), 64.0).to(like))
        return memory[-1][FENCE:-FENCE].view(like.shape).fill_(math.nan)

    def empty_like(x: Tensor, **options: Any) -> Tensor:
        return fenced(new_empty(x, x.shape, dtype=options.get("dtype")))

    monkeypatch.setattr(torch, "empty_like", empty_like)
    monkeypatch.setattr(Tensor, "new_empty", lambda *args, **kw: fenced(new_empty(*args, **kw)))
    return memory


@pytest.mark.parametrize("width", [WIDTH, BLOCKS])
@two_forms
def test_every_element_is_written_and_no_other(
    form: Form, width: int, fences: list[Tensor]
) -> None:
    assert_exact_in(misaligned, form, tensors(form, 2, width=width))
    assert fences
    for x in fences:
        assert (x[:FENCE] == 64).all()
        assert (x[-FENCE:] == 64).all()


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@every_form
def test_kernels_are_as_exact_as_pytorch(form: Form, dtype: torch.dtype) -> None:
    assert_exact(form, tensors(form, 2, 3, dtype=dtype))


@pytest.mark.parametrize(
    ("width", "x", "residual", "weight"),
    [
        (WIDTH, BFLOAT16, BFLOAT16, FLOAT32),
        (WIDTH, FLOAT16, FLOAT16, FLOAT32),
        (WIDTH, FLOAT32, FLOAT32, BFLOAT16),
        (WIDTH, BFLOAT16, FLOAT32, BFLOAT16),
        (WIDTH, BFLOAT16, FLOAT32, FLOAT32),
        (WIDTH, FLOAT32, BFLOAT16, FLOAT32),
        (WIDTH, FLOAT16, BFLOAT16, FLOAT16),
        (BLOCKS, BFLOAT16, FLOAT32, FLOAT32),
        (BLOCKS, FLOAT16, FLOAT16, FLOAT16),
    ],
    ids=str,
)
@pytest.mark.parametrize("form", [NORM, ADD, LINEAR], ids=str)
def test_types_mix(
    form: Form, width: int, x: torch.dtype, residual: torch.dtype, weight: torch.dtype
) -> None:
    types = {"x": x, "residual": residual, "weight": weight, "projection": x}
    inputs = zip(form.inputs, tensors(form, 2, width=width), strict=True)
    assert_exact(form, [sixteenths(t).to(types[name]) for name, t in inputs])


def test_programs_add_up_in_float32() -> None:
    x, weight = tensors(NORM, 1)
    # The gradients of two rows, one a program, are 64 times as large as their sum.
    signs = torch.tensor([[64.0], [-63.0]], device=DEVICE)

    def difference(function: Outputs, dtype: torch.dtype = torch.float32) -> Operator:
        rows = x.to(dtype).expand(2, -1)
        return lambda weight: (signs * function(rows, weight)[0]).sum(dim=0)

    assert_operator_as_exact_as(
        difference(NORM.operator),
        difference(NORM.reference),
        difference(NORM.reference, torch.float64),
        [weight.bfloat16()],
    )


@pytest.mark.parametrize("width", [1, 3, 127, 129, 2047, 2049, 5461, 5632, 65_535, 65_537, 100_003])
@two_forms
def test_odd_widths(form: Form, width: int) -> None:
    assert_exact(form, tensors(form, 2 if width < 10_000 else 1, width=width))


@pytest.mark.parametrize("rows", [1, PROGRAMS - 1, PROGRAMS, PROGRAMS + 1, 2 * PROGRAMS + 1])
@two_forms
def test_rows_are_shared_among_programs(form: Form, rows: int) -> None:
    assert_exact(form, tensors(form, rows))


@pytest.mark.parametrize("width", [WIDTH, BLOCKS])
@every_form
def test_no_rows(form: Form, width: int) -> None:
    inputs = tensors(form, 2, 0, width=width)
    results = outputs_and_gradients(form.operator, inputs)
    for actual, expected in zip(
        results, outputs_and_gradients(form.reference, inputs), strict=True
    ):
        assert actual.shape == expected.shape
        assert not actual.any()


@pytest.mark.parametrize("leading", [(), (1,), (2, 1, 2)])
@every_form
def test_leading_dimensions(form: Form, leading: tuple[int, ...]) -> None:
    assert_exact(form, tensors(form, *leading))


@pytest.mark.parametrize("eps", [1e-6, 1e-5])
def test_eps_of_recipes(eps: float) -> None:
    def with_eps(function: Callable[..., Tensor]) -> Operator:
        return lambda x, weight: function(x, weight, eps)

    # Of the size of the root of eps, where eps is half of what is under the root.
    inputs = tensors(NORM, 3)
    inputs[0] *= eps**0.5
    assert_operator_as_exact_as(
        with_eps(rms_norm), with_eps(rms_norm_reference), with_eps(rms_norm_reference), inputs
    )


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@every_form
def test_rows_of_zeros(form: Form, dtype: torch.dtype) -> None:
    assert_exact(form, [torch.zeros_like(t) for t in tensors(form, 2, dtype=dtype)])


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("size", [300.0, 1e4])
def test_squares_beyond_float16(size: float, dtype: torch.dtype) -> None:
    x, weight = tensors(NORM, 2, dtype=dtype)
    assert_exact(NORM, [x.sign() * size, weight])


@pytest.mark.parametrize("width", [WIDTH, BLOCKS])
def test_normalises_the_sum_as_rounded(width: int) -> None:
    x, residual, weight = tensors(ADD, 2, width=width, dtype=torch.bfloat16)
    y, stream, rstd = add_rms_norm_fwd(x, residual, weight, EPS)
    wide = stream.double()
    truth = torch.rsqrt(wide.square().mean(dim=-1) + EPS)
    # A sum of up to 33,000 terms in float32.
    torch.testing.assert_close(rstd.double(), truth, rtol=1e-5, atol=0)
    # One rounding to bfloat16, where that of the sum would be a second one.
    eps = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(
        y.double(), wide * truth[:, None] * weight.double(), rtol=1.01 * eps, atol=0
    )


def test_a_tensor_is_added_to_itself() -> None:
    def twice(function: Outputs) -> Outputs:
        return lambda x, weight: function(x, x, weight)

    assert_operator_as_exact_as(
        twice(ADD.operator), twice(ADD.reference), twice(ADD.reference), tensors(NORM, 3)
    )


@pytest.mark.parametrize("layout", [transposed, every_other, part_of_wider_rows])
@every_form
def test_strided_inputs_and_gradients(form: Form, layout: Layout) -> None:
    inputs = tensors(form, 3)
    assert not layout(inputs[0]).is_contiguous()
    assert_exact_in(layout, form, inputs)


@pytest.mark.parametrize("form", [NORM, ADD], ids=str)
def test_expanded_inputs(form: Form) -> None:
    assert_exact_in(first_everywhere, form, tensors(form, 3))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@every_form
def test_misaligned_inputs_and_gradients(form: Form, dtype: torch.dtype) -> None:
    inputs = tensors(form, 3, dtype=dtype)
    assert misaligned(inputs[0]).data_ptr() % 16
    # A kernel is compiled for the alignment of its first arguments.
    assert_exact(form, inputs)
    assert_exact_in(misaligned, form, inputs)


@pytest.mark.parametrize("dim", [0, None])
@every_form
def test_gradients_of_zero_stride(form: Form, dim: int | None) -> None:
    # Zero, with a gradient.
    def summed(function: Outputs) -> Outputs:
        return lambda *leaves: tuple((x - x.detach()).sum(dim) for x in function(*leaves))

    assert_operator_as_exact_as(
        summed(form.operator), summed(form.reference), summed(form.reference), tensors(form, 3)
    )


@every_form
def test_a_row_of_nan_stays_alone(form: Form) -> None:
    leaves, upstream = leaves_and_upstream(form, 3)
    clean = step(form, leaves, upstream)
    with torch.no_grad():
        leaves[0][1] = math.nan
    for poisoned, expected in zip(step(form, leaves, upstream), clean, strict=True):
        if poisoned.shape[0] == 3:
            assert_equal([poisoned[0], poisoned[2]], [expected[0], expected[2]])


@two_forms
def test_runs_are_bit_equal(form: Form) -> None:
    inputs = tensors(form, PROGRAMS + 1)
    assert_equal(
        outputs_and_gradients(form.operator, inputs), outputs_and_gradients(form.operator, inputs)
    )


@every_form
def test_backward_twice_is_bit_equal(form: Form) -> None:
    leaves, upstream = leaves_and_upstream(form, 3)
    outputs = form.operator(*leaves)
    first = torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)
    assert_equal(list(torch.autograd.grad(outputs, leaves, upstream)), list(first))


@pytest.mark.parametrize("layout", [torch.clone, every_other])
@every_form
def test_nothing_given_or_returned_is_written_over(form: Form, layout: Layout) -> None:
    leaves, upstream = leaves_and_upstream(form, 3)
    leaves = [layout(x.detach()).requires_grad_() for x in leaves]
    upstream = [layout(x) for x in upstream]
    outputs = form.operator(*leaves)
    kept = [x.detach() for x in (*leaves, *outputs, *upstream)]
    before = [x.clone() for x in kept]
    torch.autograd.grad(outputs, leaves, upstream)
    assert_equal(kept, before)


@every_form
def test_a_gradient_is_shared_with_other_consumers(form: Form) -> None:
    leaves, upstream = leaves_and_upstream(form, 3)
    alone = step(form, leaves, upstream)[len(upstream) :]
    others = [torch.zeros_like(x, requires_grad=True) for x in upstream]
    outputs = [x + other for x, other in zip(form.operator(*leaves), others, strict=True)]
    shared = torch.autograd.grad(outputs, [*others, *leaves], [x.clone() for x in upstream])
    assert_equal(list(shared), [*upstream, *alone])


def test_gradients_of_the_addends_are_two_tensors() -> None:
    (x, residual, weight), upstream = leaves_and_upstream(ADD, 3)
    torch.autograd.backward(ADD.operator(x, residual, weight), upstream)
    assert x.grad is not None
    assert residual.grad is not None
    assert torch.equal(x.grad, residual.grad)
    assert x.grad.data_ptr() != residual.grad.data_ptr()


@pytest.mark.parametrize(
    ("form", "trained"),
    [
        pytest.param(form, trained, id=f"{form}-{'+'.join(trained)}")
        for form in FORMS
        for size in range(1, len(form.inputs))
        for trained in combinations(form.inputs, size)
    ],
)
def test_frozen_inputs_change_no_other_gradient(form: Form, trained: tuple[str, ...]) -> None:
    leaves, upstream = leaves_and_upstream(form, 3)
    gradients = dict(zip(form.inputs, step(form, leaves, upstream)[len(upstream) :], strict=True))
    by_name = {
        name: leaf.detach().requires_grad_(name in trained)
        for name, leaf in zip(form.inputs, leaves, strict=True)
    }
    # A stream that starts with a frozen x has no gradient.
    outputs = [
        (x, dx)
        for x, dx in zip(form.operator(*by_name.values()), upstream, strict=True)
        if x.requires_grad
    ]
    some = torch.autograd.grad(
        [x for x, _ in outputs], [by_name[name] for name in trained], [dx for _, dx in outputs]
    )
    assert_equal(list(some), [gradients[name] for name in trained])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@every_form
def test_without_gradients(form: Form, mode: Callable[[], AbstractContextManager[None]]) -> None:
    leaves = [x.requires_grad_() for x in tensors(form, 3)]
    with mode():
        outputs = form.operator(*leaves)
    assert_equal(list(outputs), list(form.operator(*leaves)))
    # A stream that starts is x itself.
    assert not any(x.requires_grad for x in outputs if x is not leaves[0])


def test_double_backward_is_refused() -> None:
    leaves, upstream = leaves_and_upstream(ADD, 3)
    upstream = [x.requires_grad_() for x in upstream]
    gradients = torch.autograd.grad(ADD.operator(*leaves), leaves, upstream, create_graph=True)
    for gradient in gradients:
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


@pytest.mark.parametrize("form", FORMS[1:], ids=str)
def test_the_normalised_alone_is_used(form: Form) -> None:
    assert_operator_as_exact_as(
        lambda *leaves: form.operator(*leaves)[0],
        lambda *leaves: form.reference(*leaves)[0],
        lambda *leaves: form.reference(*leaves)[0],
        tensors(form, 3),
    )


@pytest.mark.parametrize("form", FORMS[1:], ids=str)
def test_the_stream_alone_is_used(form: Form) -> None:
    leaves, (_, dstream) = leaves_and_upstream(form, 3)
    _, stream = form.operator(*leaves)
    gradients = torch.autograd.grad(stream, leaves, dstream, allow_unused=True)
    for name, gradient in zip(form.inputs, gradients, strict=True):
        if name in ("x", "residual"):
            assert gradient is not None
            assert torch.equal(gradient, dstream)
        else:
            assert gradient is None


@every_form
def test_the_stream_alone_is_saved(form: Form) -> None:
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    leaves = [x.requires_grad_() for x in tensors(form, 3)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        outputs = form.operator(*leaves)
    stream = outputs[-1] if "residual" in form.inputs else leaves[0]
    wide = [x for x in saved if x.shape == stream.shape]
    assert [x.data_ptr() for x in wide] == [stream.data_ptr()]


@pytest.mark.parametrize("changed", ["stream", "weight", "projection"])
def test_a_change_of_what_was_saved_is_noticed(changed: str) -> None:
    leaves, upstream = leaves_and_upstream(LINEAR, 3)
    out, stream = LINEAR.operator(*leaves)
    named = dict(zip(LINEAR.inputs, leaves, strict=True)) | {"stream": stream}
    with torch.no_grad():
        named[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad((out, stream), leaves, upstream)


@pytest.mark.parametrize("form", [LINEAR, START_LINEAR], ids=str)
def test_autocast_takes_the_projection_for_that_of_a_linear(form: Form) -> None:
    def under_autocast(function: Outputs) -> Outputs:
        def call(*leaves: Tensor) -> tuple[Tensor, ...]:
            with torch.autocast(DEVICE, torch.bfloat16):
                outputs = function(*leaves)
            assert [x.dtype for x in outputs] == [torch.bfloat16, torch.float32]
            return outputs

        return call

    assert_operator_as_exact_as(
        under_autocast(form.operator),
        under_autocast(form.reference),
        form.reference,
        tensors(form, 3),
    )


# The row times the width is what can be beyond 32 bits.
COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fastllama_kernels.rms_norm import _rms_norm_bwd_kernel, _rms_norm_fwd_kernel

def show(kernel, **constants):
    types = {name: "i32" if name == "n_rows" else "*bf16" for name in kernel.arg_names}
    source = ASTSource(kernel, types | dict.fromkeys(constants, "constexpr"), constants)
    print(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ttir"])

for block in (1024, 512):
    size = {"D": 1000, "BLOCK": block}
    show(_rms_norm_fwd_kernel, **size, eps=1e-5, HAS_RESIDUAL=True)
    show(_rms_norm_bwd_kernel, **size, HAS_DSTREAM=True, RECOMPUTE=True, NUM_STAGES=3)
"""


def without_interpreter(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a process of its own: this one may have the interpreter."""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path)} | environment,
    )


def test_offsets_of_rows_have_64_bits(tmp_path: Path) -> None:
    result = without_interpreter(COMPILE, TRITON_CACHE_DIR=str(tmp_path))
    assert set(re.findall(r"muli .*%c1000_\w+ : (\w+)", result.stdout)) == {"i64"}, result.stderr


def good_arguments() -> dict[str, Tensor]:
    return dict(zip(LINEAR.inputs, tensors(LINEAR, 2), strict=True))


@pytest.mark.parametrize(
    ("form", "name"),
    [(form, name) for form in FORMS for name in form.inputs if name != "projection"],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_refuses_the_type_of(form: Form, name: str, dtype: torch.dtype) -> None:
    arguments = good_arguments()
    arguments[name] = arguments[name].to(dtype)
    with pytest.raises(ValueError, match=f"^{name} is {dtype}, and the Triton operators take"):
        form.operator(*(arguments[name] for name in form.inputs))


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
        for form in FORMS
        if name in form.inputs
    ],
    ids=str,
)
def test_refuses_the_shape_of(form: Form, name: str, shape: tuple[int, ...], message: str) -> None:
    arguments = good_arguments()
    arguments[name] = torch.ones(shape, device=DEVICE)
    with pytest.raises(ValueError, match=message):
        form.operator(*(arguments[name] for name in form.inputs))


def test_off_the_gpu_says_what_to_do() -> None:
    error = without_interpreter(
        "import torch; from fastllama_kernels import TRITON;"
        "TRITON.rms_norm(torch.ones(2, 8), torch.ones(8), 1e-5)"
    ).stderr
    assert "ValueError: The Triton operator rms_norm_fwd needs tensors on a CUDA" in error
    assert "use the REFERENCE operators there, or set TRITON_INTERPRET=1" in error


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    form=st.sampled_from(FORMS),
    leading=st.lists(st.integers(1, 3), min_size=1, max_size=2),
    width=st.integers(1, 70),
    dtypes=st.tuples(*3 * [st.sampled_from(KERNEL_DTYPES)]),
    layout=st.sampled_from([torch.clone, transposed, every_other, part_of_wider_rows, misaligned]),
)
def test_any_shape_type_and_layout(
    form: Form,
    leading: list[int],
    width: int,
    dtypes: tuple[torch.dtype, ...],
    layout: Layout,
) -> None:
    names = ("x", "residual", "weight", "projection")
    types = dict(zip(names, (*dtypes, dtypes[0]), strict=True))
    inputs = zip(form.inputs, tensors(form, *leading, width=width), strict=True)
    assert_exact_in(layout, form, [sixteenths(t).to(types[name]) for name, t in inputs])


@pytest.mark.gpu
def test_more_elements_than_32_bits_count() -> None:
    rows, width = 2**31 // 2048 + 2, 2048
    x, residual, dy, dstream = (
        torch.randn(rows, width, dtype=torch.bfloat16, device=DEVICE) for _ in range(4)
    )
    weight = randn(width, seed=0, dtype=torch.float32)
    # The gradient of the weight is that of the last row, too.
    dy[:-1] = 0
    results = []
    for part in (slice(None), slice(-1, None)):
        leaves = [x[part].requires_grad_(), residual[part].requires_grad_(), weight]
        y, stream = ADD.operator(*leaves[:2], weight.requires_grad_())
        gradients = torch.autograd.grad((y, stream), leaves, (dy[part], dstream[part]))
        results.append([y[-1], stream[-1], gradients[0][-1], gradients[1][-1], gradients[2]])
    assert_equal(*results)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@every_form
def test_never_waits_for_the_gpu(form: Form) -> None:
    leaves, upstream = leaves_and_upstream(form, 3)
    step(form, leaves, upstream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(form, leaves, upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@every_form
def test_runs_on_the_current_stream(form: Form) -> None:
    leaves, upstream = leaves_and_upstream(form, 3)
    expected = step(form, leaves, upstream)
    values = [x.detach().clone() for x in leaves]
    with torch.no_grad():
        torch._foreach_mul_(leaves, math.nan)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()), torch.no_grad():
        # Another stream would not wait for this, and find NaN.
        torch.cuda._sleep(100_000_000)
        torch._foreach_copy_(leaves, values)
        with torch.enable_grad():
            actual = step(form, leaves, upstream)
    torch.cuda.synchronize()
    assert_equal(actual, expected)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@every_form
def test_runs_on_the_device_of_its_tensors(form: Form) -> None:
    leaves, upstream = leaves_and_upstream(form, 3)
    there = [x.detach().to("cuda:1").requires_grad_() for x in leaves]
    actual = step(form, there, [x.to("cuda:1") for x in upstream])
    assert {x.device for x in actual} == {torch.device("cuda:1")}
    assert_equal([x.to(DEVICE) for x in actual], step(form, leaves, upstream))


@pytest.mark.gpu
@every_form
def test_is_captured_in_a_cuda_graph(form: Form) -> None:
    leaves, upstream = leaves_and_upstream(form, 3)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(form, leaves, upstream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(form, leaves, upstream)
    with torch.no_grad():
        torch._foreach_mul_([*leaves, *upstream], -0.5)
    graph.replay()
    assert_equal(captured, step(form, leaves, upstream))
