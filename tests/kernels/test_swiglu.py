import math
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fastllama_kernels.swiglu import (
    swiglu,
    swiglu_linear,
    swiglu_linear_reference,
    swiglu_reference,
)
from tests.compare import (
    DEVICE,
    DTYPES,
    KERNEL_DTYPES,
    assert_operator_as_exact_as,
    outputs_and_gradients,
    randn,
)

WIDTH, OUT = 24, 7

Layout = Callable[[Tensor], Tensor]
Operator = Callable[..., Tensor]


@dataclass(frozen=True)
class Form:
    """A public function, and its definition."""

    operator: Operator
    reference: Operator
    inputs: tuple[str, ...]

    def __str__(self) -> str:
        return self.operator.__name__


GATE = Form(swiglu, swiglu_reference, ("gate_up",))
LINEAR = Form(swiglu_linear, swiglu_linear_reference, ("gate_up", "down"))

both_forms = pytest.mark.parametrize("form", [GATE, LINEAR], ids=str)


def tensors(
    form: Form, *leading: int, width: int = WIDTH, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    # Wide enough for gates on which sigmoid is near 0 and 1.
    gate_up = 3 * randn(*leading, 2 * width, seed=0)
    down = randn(OUT, width, seed=1)
    return [x.to(dtype) for x in (gate_up, down)[: len(form.inputs)]]


def leaves_and_upstream(form: Form, *leading: int) -> tuple[list[Tensor], Tensor]:
    leaves = [x.requires_grad_() for x in tensors(form, *leading)]
    with torch.no_grad():
        shape = form.operator(*leaves).shape
    return leaves, randn(*shape, seed=2, dtype=torch.float32)


def step(form: Form, leaves: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """The output and the gradients, with nothing copied on the way."""
    output = form.operator(*leaves)
    return [output, *torch.autograd.grad(output, leaves, upstream)]


def assert_exact(form: Form, inputs: list[Tensor]) -> None:
    assert_operator_as_exact_as(form.operator, form.reference, form.reference, inputs)


def assert_exact_in(layout: Layout, form: Form, inputs: list[Tensor]) -> None:
    """The same, with inputs and gradient of the output as `layout` puts them in memory."""

    def laid_out(function: Operator) -> Operator:
        return lambda *leaves: layout(function(*map(layout, leaves)))

    assert_operator_as_exact_as(
        laid_out(form.operator), laid_out(form.reference), laid_out(form.reference), inputs
    )


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


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


# The kernels, from here on.


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


@pytest.mark.parametrize("width", [WIDTH, 1025])
@both_forms
def test_every_element_is_written_and_no_other(
    form: Form, width: int, fences: list[Tensor]
) -> None:
    assert_exact_in(misaligned, form, tensors(form, 3, width=width))
    assert fences
    for x in fences:
        assert (x[:FENCE] == 64).all()
        assert (x[-FENCE:] == 64).all()


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@both_forms
def test_kernels_are_as_exact_as_pytorch(form: Form, dtype: torch.dtype) -> None:
    assert_exact(form, tensors(form, 2, 3, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_width_types_are_rounded_once(dtype: torch.dtype) -> None:
    inputs = tensors(GATE, 3, dtype=dtype)
    truths = outputs_and_gradients(swiglu_reference, [x.double() for x in inputs])
    for actual, truth in zip(outputs_and_gradients(swiglu, inputs), truths, strict=True):
        # One rounding, of any direction, of a sum of float32 whose terms may cancel.
        torch.testing.assert_close(
            actual.double(), truth, rtol=1.01 * torch.finfo(dtype).eps, atol=1e-5
        )


# A program takes at most 1,024 columns.
@pytest.mark.parametrize(
    "width", [1, 2, 3, 127, 129, 1023, 1024, 1025, 2047, 2049, 5461, 5632, 65_537, 100_003]
)
def test_odd_widths(width: int) -> None:
    assert_exact(LINEAR, tensors(LINEAR, 2 if width < 10_000 else 1, width=width))


@pytest.mark.parametrize("rows", [1, 2, 33])
@both_forms
def test_any_number_of_rows(form: Form, rows: int) -> None:
    assert_exact(form, tensors(form, rows))


@both_forms
def test_no_rows(form: Form) -> None:
    inputs = tensors(form, 2, 0)
    results = outputs_and_gradients(form.operator, inputs)
    for actual, expected in zip(
        results, outputs_and_gradients(form.reference, inputs), strict=True
    ):
        assert actual.shape == expected.shape
        assert not actual.any()


@pytest.mark.parametrize("leading", [(), (1,), (2, 1, 2)])
@both_forms
def test_leading_dimensions(form: Form, leading: tuple[int, ...]) -> None:
    assert_exact(form, tensors(form, *leading))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@both_forms
def test_rows_of_zeros(form: Form, dtype: torch.dtype) -> None:
    assert_exact(form, [torch.zeros_like(x) for x in tensors(form, 2, dtype=dtype)])


# NumPy's, which the interpreter computes with, where a GPU says nothing.
LIMITS = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


@LIMITS
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_gates_beyond_the_range_of_exp(dtype: torch.dtype) -> None:
    gates = torch.tensor([-1e4, -1e3, -100, 0, 100, 1e3, 1e4])
    gate_up = torch.stack([gates, torch.full_like(gates, 3)]).flatten()
    assert_exact(GATE, [gate_up.to(DEVICE, dtype)])


@LIMITS
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_infinities_and_nan_are_those_of_pytorch(dtype: torch.dtype) -> None:
    values = [-math.inf, math.inf, math.nan, -1e4, 0.0, 1e4]
    pairs = torch.tensor([[gate, up] for gate in values for up in values])
    inputs = [pairs.T.flatten().to(DEVICE, dtype)]
    results = outputs_and_gradients(swiglu, inputs)
    for actual, expected in zip(results, outputs_and_gradients(plain, inputs), strict=True):
        finite = expected.isfinite()
        torch.testing.assert_close(actual[~finite], expected[~finite], equal_nan=True)
        assert actual[finite].isfinite().all()


@pytest.mark.parametrize("layout", [transposed, every_other, part_of_wider_rows])
@both_forms
def test_strided_inputs_and_gradients(form: Form, layout: Layout) -> None:
    inputs = tensors(form, 3)
    assert not layout(inputs[0]).is_contiguous()
    assert_exact_in(layout, form, inputs)


def test_expanded_inputs() -> None:
    assert_exact_in(first_everywhere, GATE, tensors(GATE, 3))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@both_forms
def test_misaligned_inputs_and_gradients(form: Form, dtype: torch.dtype) -> None:
    inputs = tensors(form, 3, dtype=dtype)
    assert misaligned(inputs[0]).data_ptr() % 16
    # A kernel is compiled for the alignment of its first arguments.
    assert_exact(form, inputs)
    assert_exact_in(misaligned, form, inputs)


@pytest.mark.parametrize("dim", [0, None])
@both_forms
def test_gradients_of_zero_stride(form: Form, dim: int | None) -> None:
    # Zero, with a gradient.
    def summed(function: Operator) -> Operator:
        def call(*leaves: Tensor) -> Tensor:
            output = function(*leaves)
            return (output - output.detach()).sum(dim)

        return call

    assert_operator_as_exact_as(
        summed(form.operator), summed(form.reference), summed(form.reference), tensors(form, 3)
    )


@both_forms
def test_a_row_of_nan_stays_alone(form: Form) -> None:
    leaves, upstream = leaves_and_upstream(form, 3)
    clean = step(form, leaves, upstream)
    with torch.no_grad():
        leaves[0][1] = math.nan
    for poisoned, expected in zip(step(form, leaves, upstream), clean, strict=True):
        if poisoned.shape[0] == 3:
            assert_equal([poisoned[0], poisoned[2]], [expected[0], expected[2]])


@both_forms
def test_runs_are_bit_equal(form: Form) -> None:
    inputs = tensors(form, 5)
    assert_equal(
        outputs_and_gradients(form.operator, inputs), outputs_and_gradients(form.operator, inputs)
    )


@both_forms
def test_backward_twice_is_bit_equal(form: Form) -> None:
    leaves, upstream = leaves_and_upstream(form, 3)
    output = form.operator(*leaves)
    first = torch.autograd.grad(output, leaves, upstream, retain_graph=True)
    assert_equal(list(torch.autograd.grad(output, leaves, upstream)), list(first))


@pytest.mark.parametrize("layout", [torch.clone, every_other])
@both_forms
def test_nothing_given_or_returned_is_written_over(form: Form, layout: Layout) -> None:
    leaves, upstream = leaves_and_upstream(form, 3)
    leaves = [layout(x.detach()).requires_grad_() for x in leaves]
    upstream = layout(upstream)
    output = form.operator(*leaves)
    kept = [x.detach() for x in (*leaves, output, upstream)]
    before = [x.clone() for x in kept]
    torch.autograd.grad(output, leaves, upstream)
    assert_equal(kept, before)


@both_forms
def test_a_gradient_is_shared_with_other_consumers(form: Form) -> None:
    leaves, upstream = leaves_and_upstream(form, 3)
    _, *alone = step(form, leaves, upstream)
    other = torch.zeros_like(upstream, requires_grad=True)
    shared = torch.autograd.grad(form.operator(*leaves) + other, [other, *leaves], upstream.clone())
    assert_equal(list(shared), [upstream, *alone])


@pytest.mark.parametrize("trained", LINEAR.inputs)
def test_frozen_inputs_change_no_other_gradient(trained: str) -> None:
    leaves, upstream = leaves_and_upstream(LINEAR, 3)
    _, *gradients = step(LINEAR, leaves, upstream)
    index = LINEAR.inputs.index(trained)
    some = [x.detach().requires_grad_(i == index) for i, x in enumerate(leaves)]
    (gradient,) = torch.autograd.grad(swiglu_linear(*some), some[index], upstream)
    assert torch.equal(gradient, gradients[index])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@both_forms
def test_without_gradients(form: Form, mode: Callable[[], AbstractContextManager[None]]) -> None:
    leaves = [x.requires_grad_() for x in tensors(form, 3)]
    with mode():
        output = form.operator(*leaves)
    assert torch.equal(output, form.operator(*leaves))
    assert not output.requires_grad


def test_double_backward_is_refused() -> None:
    leaves, upstream = leaves_and_upstream(LINEAR, 3)
    gradients = torch.autograd.grad(
        swiglu_linear(*leaves), leaves, upstream.requires_grad_(), create_graph=True
    )
    for gradient in gradients:
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


@both_forms
def test_gate_up_and_down_alone_are_saved(form: Form) -> None:
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    leaves = [x.requires_grad_() for x in tensors(form, 3)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        form.operator(*leaves)
    assert [x.data_ptr() for x in saved] == [x.data_ptr() for x in leaves]


@pytest.mark.parametrize("changed", LINEAR.inputs)
def test_a_change_of_what_was_saved_is_noticed(changed: str) -> None:
    leaves, upstream = leaves_and_upstream(LINEAR, 3)
    output = swiglu_linear(*leaves)
    with torch.no_grad():
        leaves[LINEAR.inputs.index(changed)].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(output, leaves, upstream)


def test_autocast_takes_down_for_that_of_a_linear() -> None:
    def under_autocast(function: Operator) -> Operator:
        def call(gate_up: Tensor, down: Tensor) -> Tensor:
            with torch.autocast(DEVICE, torch.bfloat16):
                output = function(gate_up, down)
            assert output.dtype == torch.bfloat16
            return output

        return call

    assert_operator_as_exact_as(
        under_autocast(swiglu_linear),
        under_autocast(swiglu_linear_reference),
        swiglu_linear_reference,
        tensors(LINEAR, 3),
    )


# The row times the width is what can be beyond 32 bits.
COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fastllama_kernels.swiglu import _swiglu_bwd_kernel, _swiglu_fwd_kernel

def show(kernel, **constants):
    types = {name: "*bf16" for name in kernel.arg_names}
    source = ASTSource(kernel, types | dict.fromkeys(constants, "constexpr"), constants)
    print(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ttir"])

show(_swiglu_fwd_kernel, F=1000, BLOCK=512)
show(_swiglu_bwd_kernel, F=1000, BLOCK=512, RECOMPUTE=True)
"""


def test_offsets_of_rows_have_64_bits(tmp_path: Path) -> None:
    # In a process of its own: this one may have the interpreter.
    result = subprocess.run(
        [sys.executable, "-c", COMPILE],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path), "TRITON_CACHE_DIR": str(tmp_path)},
    )
    # All but those of the number of a block and its 512 columns.
    products = re.findall(r"muli .*%c(\d+)_\w+ : (\w+)", result.stdout)
    assert {size for factor, size in products if factor != "512"} == {"i64"}, result.stderr


@pytest.mark.parametrize("form", [GATE, LINEAR], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_refuses_the_type_of_gate_up(form: Form, dtype: torch.dtype) -> None:
    gate_up, *down = tensors(form, 2)
    with pytest.raises(ValueError, match=f"^gate_up is {dtype}, and the Triton operators take"):
        form.operator(gate_up.to(dtype), *down)


@both_forms
def test_refuses_an_odd_gate_up(form: Form) -> None:
    gate_up, *down = tensors(form, 2)
    with pytest.raises(ValueError, match=r"gate_up has shape \(2, 47\); .* must be even"):
        form.operator(gate_up[:, 1:], *down)


@pytest.mark.parametrize("shape", [(7, 23), (7, 48), (24,), (24, 7), (2, 7, 24)])
def test_refuses_the_shape_of_down(shape: tuple[int, ...]) -> None:
    (gate_up,) = tensors(GATE, 2)
    message = rf"down has shape {re.escape(str(shape))}, and needs \(D, 24\)"
    with pytest.raises(ValueError, match=message):
        swiglu_linear(gate_up, torch.ones(shape, device=DEVICE))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    form=st.sampled_from([GATE, LINEAR]),
    leading=st.lists(st.integers(1, 3), min_size=1, max_size=2),
    width=st.integers(1, 70),
    dtype=st.sampled_from(KERNEL_DTYPES),
    layout=st.sampled_from([torch.clone, transposed, every_other, part_of_wider_rows, misaligned]),
)
def test_any_shape_type_and_layout(
    form: Form, leading: list[int], width: int, dtype: torch.dtype, layout: Layout
) -> None:
    assert_exact_in(layout, form, tensors(form, *leading, width=width, dtype=dtype))


@pytest.mark.gpu
def test_more_elements_than_32_bits_count() -> None:
    # h has more than 2^31 elements, and gate_up 2^32.
    rows, width = 2**31 // 2048 + 2, 2048
    gate_up = torch.randn(rows, 2 * width, dtype=torch.bfloat16, device=DEVICE)
    dh = torch.randn(rows, width, dtype=torch.bfloat16, device=DEVICE)
    results = []
    for part in (slice(None), slice(-1, None)):
        leaf = gate_up[part].requires_grad_()
        h = swiglu(leaf)
        (gradient,) = torch.autograd.grad(h, leaf, dh[part])
        results.append([h[-1], gradient[-1]])
    assert_equal(*results)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@both_forms
def test_never_waits_for_the_gpu(form: Form) -> None:
    leaves, upstream = leaves_and_upstream(form, 3)
    step(form, leaves, upstream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(form, leaves, upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@both_forms
def test_runs_on_the_current_stream(form: Form) -> None:
    leaves, upstream = leaves_and_upstream(form, 3)
    expected = step(form, leaves, upstream)
    values = [x.detach().clone() for x in leaves]
    with torch.no_grad():
        torch._foreach_mul_(leaves, math.nan)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        # Another stream would not wait for this, and find NaN.
        torch.cuda._sleep(100_000_000)
        with torch.no_grad():
            torch._foreach_copy_(leaves, values)
        actual = step(form, leaves, upstream)
    torch.cuda.synchronize()
    assert_equal(actual, expected)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@both_forms
def test_runs_on_the_device_of_its_tensors(form: Form) -> None:
    leaves, upstream = leaves_and_upstream(form, 3)
    there = [x.detach().to("cuda:1").requires_grad_() for x in leaves]
    actual = step(form, there, upstream.to("cuda:1"))
    assert {x.device for x in actual} == {torch.device("cuda:1")}
    assert_equal([x.to(DEVICE) for x in actual], step(form, leaves, upstream))


@pytest.mark.gpu
@both_forms
def test_is_captured_in_a_cuda_graph(form: Form) -> None:
    leaves, upstream = leaves_and_upstream(form, 3)
    with torch.cuda.stream(torch.cuda.Stream()):
        step(form, leaves, upstream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(form, leaves, upstream)
    with torch.no_grad():
        torch._foreach_mul_([*leaves, upstream], -0.5)
    graph.replay()
    assert_equal(captured, step(form, leaves, upstream))
