"""The contract of all operators: shapes, memory, autograd, devices.

Each test runs over the table in operator_cases.py.
"""

import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import combinations, cycle
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastllama_kernels._library import n_multiprocessors
from fastllama_kernels.rms_norm import programs_per_multiprocessor
from tests.compare import (
    DEVICE,
    KERNEL_DTYPES,
    Operator,
    assert_operator_as_exact_as,
)
from tests.kernels.gpu import captured, host_wait_is_an_error, on_side_stream
from tests.kernels.layouts import EXPANDED, STRIDED, Layout, contiguous, every_other, misaligned
from tests.kernels.operator_cases import (
    CASES,
    LARGE,
    SUMS,
    WIDE,
    Arguments,
    Case,
    D,
    assert_exact,
    backward,
    forward,
    forward_and_saved,
    run,
    set_chunk_length,
)

N_PROGRAMS = n_multiprocessors(torch.device(DEVICE)) * programs_per_multiprocessor(D)
"""Programs of the backward of rms_norm."""


def for_cases(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=str)


every_case = for_cases(CASES)
every_case_and_wide = for_cases([*CASES, *WIDE])
inplace_cases = for_cases([case for case in CASES if case.inplace])


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """linear_cross_entropy takes its six tokens in two chunks."""
    set_chunk_length(4, monkeypatch)


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def laid_out(case: Case, arguments: Arguments, layout: Layout) -> Arguments:
    """Every tensor in `layout`, except inputs that must be contiguous."""
    changed = arguments.map(layout)
    if case.inplace == "gradient":
        return replace(changed, inputs=arguments.inputs)
    if layout in EXPANDED.values():
        # The weights stay: with equal columns, gradients are differences that cancel.
        first, *weights = arguments.inputs
        inputs = {first: changed.inputs[first]} | {x: arguments.inputs[x] for x in weights}
        return replace(changed, inputs=inputs)
    return changed


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    for x, y in zip(actual, expected, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


def first_input(arguments: Arguments) -> Tensor:
    return next(iter(arguments.inputs.values()))


# Results and shapes.


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@every_case
def test_matches_reference_aligned_then_misaligned(case: Case, dtype: torch.dtype) -> None:
    # Triton compiles a kernel for the alignment of its first arguments.
    assert_exact(case, case.arguments(dtype=dtype))
    arguments = case.arguments(dtype=dtype).map(misaligned)
    assert first_input(arguments).data_ptr() % 16
    assert_exact(case, arguments)


@every_case
def test_gradcheck(case: Case) -> None:
    arguments = case.arguments(dtype=torch.float64)
    inputs = list(arguments.inputs.values())
    assert torch.autograd.gradcheck(case.of_inputs(case.reference), inputs)


@pytest.mark.parametrize(("n_sequences", "n_positions"), [(0, 2), (3, 0)])
@for_cases([*CASES, *SUMS, *WIDE])
def test_no_rows(case: Case, n_sequences: int, n_positions: int) -> None:
    arguments = case.arguments(n_sequences, n_positions)
    results = run(case.triton, arguments)
    for actual, expected in zip(results, run(case.reference, arguments), strict=True):
        assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
        assert not actual.any()


@every_case
def test_nan_stays_in_its_row(case: Case) -> None:
    clean, arguments = run(case.triton, case.arguments()), case.arguments()
    first = first_input(arguments)
    others = [row for row in range(len(first)) if row != 1]
    with torch.no_grad():
        first[1] = torch.nan
    for poisoned, expected in zip(run(case.triton, arguments), clean, strict=True):
        if poisoned.shape[:1] == first.shape[:1]:
            assert torch.equal(poisoned[others], expected[others])


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@for_cases([case for case in CASES if not case.has_matmul])
def test_autocast_changes_nothing(case: Case, dtype: torch.dtype) -> None:
    expected = run(case.triton, case.arguments(dtype=dtype))
    arguments = case.arguments(dtype=dtype)
    with torch.autocast(DEVICE, torch.bfloat16):
        results = run(case.triton, arguments)
    assert_equal(results, expected)


@for_cases([case for case in CASES if case.has_matmul])
def test_autocast_casts_like_linear(case: Case) -> None:
    def under_autocast(operator: Operator) -> Operator:
        def call(*inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
            with torch.autocast(DEVICE, torch.bfloat16):
                return operator(*inputs)

        return call

    triton, reference = (case.of_inputs(x) for x in (case.triton, case.reference))
    assert_operator_as_exact_as(
        under_autocast(triton),
        under_autocast(reference),
        reference,
        list(case.inputs().values()),
        computed_in=torch.bfloat16,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
@pytest.mark.parametrize(
    ("case", "name"), [(case, name) for case in CASES for name in case.checked], ids=str
)
def test_unsupported_dtype(case: Case, name: str, dtype: torch.dtype) -> None:
    arguments = case.arguments().frozen()
    arguments.inputs[name] = arguments.inputs[name].to(dtype)
    with pytest.raises(ValueError, match=f"^{name} is {dtype}, and the Triton operators take"):
        forward(case.triton, arguments)


# Memory.


@pytest.mark.parametrize("layout", STRIDED.values(), ids=STRIDED)
def test_layouts(layout: Layout) -> None:
    x = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)
    assert not layout(x).is_contiguous()
    assert layout in EXPANDED.values() or torch.equal(layout(x), x)


@pytest.mark.parametrize("layout", STRIDED.values(), ids=STRIDED)
@every_case
def test_strided(case: Case, layout: Layout) -> None:
    assert_exact(case, laid_out(case, case.arguments(), layout))


@pytest.mark.parametrize("start", range(3))
@every_case
def test_each_tensor_in_another_layout(case: Case, start: int) -> None:
    layouts = cycle([*STRIDED.values(), contiguous, misaligned][start:])
    assert_exact(case, laid_out(case, case.arguments(), lambda x: next(layouts)(x)))


@pytest.mark.parametrize("layout", EXPANDED.values(), ids=EXPANDED)
@every_case
def test_expanded_upstream_gradient(case: Case, layout: Layout) -> None:
    arguments = case.arguments()
    upstream = tuple(layout(x) for x in arguments.upstream)
    assert_exact(case, replace(arguments, upstream=upstream))


@every_case_and_wide
def test_every_element_is_written_and_no_other(case: Case, fences: list[Tensor]) -> None:
    assert_exact(case, case.arguments().map(misaligned))
    assert fences
    assert all((fence == 64).all() for fence in fences)


@pytest.mark.parametrize("layout", [contiguous, every_other])
@every_case
def test_arguments_and_outputs_are_not_written(case: Case, layout: Layout) -> None:
    arguments = laid_out(case, case.arguments(), layout)
    first = first_input(arguments)
    is_written = bool(case.inplace) and first.is_contiguous()
    given = [*arguments.inputs.values(), *arguments.constants.values(), *arguments.upstream]
    given = [x.detach() for x in given if not (is_written and x is first)]
    before = [(x.clone(), x._version) for x in given]
    outputs = forward(case.triton, arguments)
    returned = [x.detach().clone() for x in outputs]
    backward(outputs, arguments)
    for x, (values, version) in zip(given, before, strict=True):
        assert torch.equal(x, values)
        assert x._version == version
    assert_equal([x.detach() for x in outputs], returned)


@every_case
def test_upstream_gradient_is_shared_with_other_consumers(case: Case) -> None:
    arguments = case.arguments()
    n_outputs = len(arguments.upstream)
    alone = run(case.triton, case.arguments())[n_outputs:]
    others = [torch.zeros_like(x, requires_grad=True) for x in arguments.upstream]
    sums = [x + y for x, y in zip(forward(case.triton, arguments), others, strict=True)]
    shared = torch.autograd.grad(
        sums, [*others, *arguments.inputs.values()], [x.clone() for x in arguments.upstream]
    )
    assert_equal(list(shared), [*arguments.upstream, *alone])


@every_case
def test_gradients_share_no_memory(case: Case) -> None:
    arguments = case.arguments()
    torch.autograd.backward(forward(case.triton, arguments), arguments.upstream)
    gradients = [x.grad for x in arguments.inputs.values() if x.grad is not None]
    assert len(gradients) == len(arguments.inputs)
    assert len({x.data_ptr() for x in gradients}) == len(gradients)


# Autograd.


@pytest.mark.parametrize(
    ("case", "n_sequences", "dtype"),
    [
        *((case, 3, torch.bfloat16) for case in CASES),
        *((case, 3, torch.float32) for case in [*CASES, *WIDE]),
        # More rows than the backward has programs.
        *((case, N_PROGRAMS + 1, torch.float32) for case in CASES if "rms_norm" in case.name),
    ],
    ids=str,
)
def test_runs_are_bit_equal(case: Case, n_sequences: int, dtype: torch.dtype) -> None:
    first, second = (run(case.triton, case.arguments(n_sequences, 1, dtype)) for _ in range(2))
    assert_equal(first, second)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@for_cases([case for case in CASES if case.inplace != "gradient"])
def test_second_backward_is_bit_equal(case: Case, dtype: torch.dtype) -> None:
    arguments = case.arguments(dtype=dtype)
    outputs = forward(case.triton, arguments)
    first = [x.clone() for x in backward(outputs, arguments, retain_graph=True)]
    assert_equal(list(backward(outputs, arguments)), first)


@pytest.mark.parametrize("scale", [1.0, 0.37])
@for_cases([case for case in CASES if case.inplace == "gradient"])
def test_second_backward_of_an_inplace_gradient_raises(case: Case, scale: float) -> None:
    arguments = case.arguments().map(contiguous)
    upstream = tuple(torch.full_like(x, scale) for x in arguments.upstream)
    arguments = replace(arguments, upstream=upstream)
    outputs = forward(case.triton, arguments)
    backward(outputs, arguments, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        backward(outputs, arguments)


@every_case
def test_double_backward_raises(case: Case) -> None:
    arguments = case.arguments()
    upstream = tuple(x.requires_grad_() for x in arguments.upstream)
    outputs = forward(case.triton, arguments)
    arguments = replace(arguments, upstream=upstream)
    for gradient in backward(outputs, arguments, create_graph=True):
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


@every_case
def test_zero_upstream_gradient(case: Case) -> None:
    arguments = case.arguments()
    arguments = replace(arguments, upstream=tuple(map(torch.zeros_like, arguments.upstream)))
    assert not any(x.any() for x in backward(forward(case.triton, arguments), arguments))


@pytest.mark.parametrize("scale", [0.37, 1_024.0, -3.0])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@for_cases([case for case in CASES if case.outputs[0] == "loss" and "-none" not in case.name])
def test_scaled_loss(case: Case, dtype: torch.dtype, scale: float) -> None:
    def scaled(operator: Operator) -> Operator:
        def call(*inputs: Tensor) -> Tensor:
            outputs = operator(*inputs)
            return scale * (outputs if isinstance(outputs, Tensor) else outputs[0])

        return call

    triton, reference = scaled(case.of_inputs(case.triton)), scaled(case.of_inputs(case.reference))
    assert_operator_as_exact_as(
        triton, reference, reference, list(case.inputs(dtype=dtype).values())
    )


@pytest.mark.parametrize(
    ("case", "output"),
    [
        (case, output)
        for case in CASES
        for output in case.outputs
        # The stream does not depend on the weights; test_rms_norm.py tests it.
        if len(case.outputs) > 1 and output != "stream"
    ],
    ids=str,
)
def test_only_one_output_is_used(case: Case, output: str) -> None:
    def one(operator: Operator) -> Operator:
        return lambda *inputs: operator(*inputs)[case.outputs.index(output)]

    triton, reference = one(case.of_inputs(case.triton)), one(case.of_inputs(case.reference))
    assert_operator_as_exact_as(triton, reference, reference, list(case.inputs().values()))


@pytest.mark.parametrize(
    ("case", "trained"),
    [
        pytest.param(case, trained, id=f"{case}-{'+'.join(trained)}")
        for case in CASES
        for size in range(1, len(case.shapes(3, 2)))
        for trained in combinations(case.shapes(3, 2), size)
    ],
)
def test_frozen_inputs_change_no_other_gradient(case: Case, trained: tuple[str, ...]) -> None:
    arguments = case.arguments()
    gradients = dict(
        zip(arguments.inputs, backward(forward(case.triton, arguments), arguments), strict=True)
    )
    arguments = arguments.frozen(trained)
    # A residual stream that starts with a frozen x has no gradient.
    outputs = [
        (x, dx)
        for x, dx in zip(forward(case.triton, arguments), arguments.upstream, strict=True)
        if x.requires_grad
    ]
    some = torch.autograd.grad(
        [x for x, _ in outputs],
        [arguments.inputs[name] for name in trained],
        [dx for _, dx in outputs],
    )
    assert_equal(list(some), [gradients[name] for name in trained])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@every_case
def test_without_gradients(case: Case, mode: Callable[[], AbstractContextManager[None]]) -> None:
    expected = forward(case.triton, case.arguments())
    arguments = case.arguments()
    with mode():
        if case.inplace:
            # In inference mode, a tensor made here has no version to bump.
            arguments = replace(arguments, inputs={"x": first_input(arguments) * 1})
        outputs = forward(case.triton, arguments)
    assert_equal(list(outputs), list(expected))
    # A residual stream may start with x itself.
    assert not any(x.requires_grad for x in outputs if x is not first_input(arguments))


@every_case
def test_frozen_inputs_make_no_graph(case: Case) -> None:
    outputs, saved = forward_and_saved(case.triton, case.arguments().frozen())
    assert not any(x.requires_grad for x in outputs)
    assert not saved


@pytest.mark.parametrize(
    ("case", "name"), [(case, name) for case in CASES for name in case.saved], ids=str
)
def test_changing_a_saved_tensor_raises(case: Case, name: str) -> None:
    arguments = case.arguments()
    outputs = forward(case.triton, arguments)
    named = dict(zip(case.outputs, outputs, strict=True))
    named |= arguments.inputs | arguments.constants
    with torch.no_grad():
        named[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        backward(outputs, arguments)


# Operators that write to their first input.


@inplace_cases
def test_inplace_bumps_version(case: Case) -> None:
    def inputs(x: Tensor) -> Arguments:
        return replace(arguments, inputs={"x": x})

    arguments = case.arguments()
    # exp saves its output, square its input.
    outputs = forward(case.triton, inputs(torch.exp(first_input(arguments))))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        backward(outputs, arguments)
    copy = case.arguments().map(contiguous)
    x = first_input(copy) * 1
    penalty = x.square().mean()
    outputs = forward(case.triton, inputs(x))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward((penalty, *outputs), (None, *arguments.upstream))


@inplace_cases
def test_dispatch_mode_may_save_the_input(case: Case) -> None:
    # Selective activation checkpointing saves the input and returns it during recomputation.
    expected = run(case.triton, case.arguments())
    arguments = case.arguments()
    first = first_input(arguments)
    before = first.detach().clone()
    with FlopCounterMode(display=False):
        results = run(case.triton, arguments)
    for pair in zip(results, expected, strict=True):
        torch.testing.assert_close(*pair)
    assert torch.equal(first, before)
    assert first._version == 0
    assert first.data_ptr() not in {x.data_ptr() for x in results}


def test_mutations_are_declared() -> None:
    written = {}
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("fastllama::"):
            arguments = getattr(
                torch.ops.fastllama, name.partition("::")[2]
            ).default._schema.arguments
            written[name] = [x.name for x in arguments if x.alias_info and x.alias_info.is_write]
    assert {name: names for name, names in written.items() if names} == {
        "fastllama::rope_": ["qkv"],
        "fastllama::accumulate_matmul_": ["total"],
        "fastllama::cross_entropy_gradient_fwd_": ["logits"],
        "fastllama::scale_": ["x"],
        "fastllama::add_scaled_": ["total"],
    }


# Devices.


@every_case
def test_off_gpu_raises(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = case.arguments(device="cpu")
    monkeypatch.setattr("fastllama_kernels._library.INTERPRETED", False)
    with pytest.raises(ValueError, match="needs tensors on a CUDA device, not on cpu"):
        forward(case.triton, arguments)


def without_interpreter(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in its own process, because this one may have the interpreter."""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path)} | environment,
    )


def test_off_gpu_without_interpreter_raises() -> None:
    error = without_interpreter(
        "import torch; from fastllama_kernels import TRITON;"
        "TRITON.rms_norm(torch.ones(2, 8), torch.ones(8), 1e-5)"
    ).stderr
    assert "ValueError: The Triton operator rms_norm_fwd needs tensors on a CUDA" in error
    assert "use the REFERENCE operators there, or set TRITON_INTERPRET=1" in error


# Widths are 1,000, so that the factor shows in the code; a block has 512 or 1,024 columns.
COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fastllama_kernels.rms_norm import _rms_norm_bwd_kernel, _rms_norm_fwd_kernel
from fastllama_kernels.swiglu import _swiglu_bwd_kernel, _swiglu_fwd_kernel

def show(kernel, **constants):
    types = {name: "i32" if name == "n_rows" else "*bf16" for name in kernel.arg_names}
    source = ASTSource(kernel, types | dict.fromkeys(constants, "constexpr"), constants)
    print(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ttir"])

for block in (1024, 512):
    size = {"D": 1000, "BLOCK": block}
    show(_rms_norm_fwd_kernel, **size, eps=1e-5, HAS_RESIDUAL=True)
    show(_rms_norm_bwd_kernel, **size, HAS_DSTREAM=True, RECOMPUTE=True, NUM_STAGES=3)
show(_swiglu_fwd_kernel, F=1000, BLOCK=512)
show(_swiglu_bwd_kernel, F=1000, BLOCK=512, RECOMPUTE=True)
"""


def test_row_offsets_are_int64(tmp_path: Path) -> None:
    result = without_interpreter(COMPILE, TRITON_CACHE_DIR=str(tmp_path))
    # The number of a block times its 512 columns stays within a row.
    products = re.findall(r"muli .*%c(\d+)_\w+ : (\w+)", result.stdout)
    assert {dtype for factor, dtype in products if factor != "512"} == {"i64"}, result.stderr


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "n_sequences", "n_positions"), LARGE, ids=str)
def test_more_elements_than_int32(case: Case, n_sequences: int, n_positions: int) -> None:
    def randn(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=DEVICE)

    def last(x: Tensor) -> Tensor:
        """The last two sequences; a copy, because the operator may write to its input."""
        return x[-2:].clone() if x.shape[:1] == (n_sequences,) else x

    shapes = case.shapes(n_sequences, n_positions)
    inputs = {name: randn(shape).requires_grad_() for name, shape in shapes.items()}
    arguments = Arguments(inputs, case.constants(n_sequences, n_positions, DEVICE), ())
    end = arguments.map(last)
    outputs = forward(case.triton, arguments)
    upstream = [randn(x.shape).to(x.dtype) for x in outputs]
    for x in upstream:
        # Only the last sequences then contribute to the gradient of a weight.
        x[:-2] = 0
    arguments = replace(arguments, upstream=tuple(upstream))
    results = [*outputs, *backward(outputs, arguments)]
    end = replace(end, upstream=tuple(map(last, upstream)))
    assert_equal([last(x) for x in results], run(case.triton, end))


@pytest.mark.gpu
@every_case
def test_host_never_waits(case: Case) -> None:
    arguments = case.arguments()
    run(case.triton, arguments.map(torch.clone))
    with host_wait_is_an_error():
        run(case.triton, arguments.map(torch.clone))


@pytest.mark.gpu
@every_case
def test_current_stream(case: Case) -> None:
    arguments = case.arguments()
    expected = run(case.triton, arguments.map(torch.clone))
    late = arguments.map(lambda x: torch.full_like(x, torch.nan) if x.is_floating_point() else x)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        # A kernel on another stream would not wait for the copy, and find NaN.
        torch.cuda._sleep(100_000_000)
        with torch.no_grad():
            torch._foreach_copy_(late.floats(), arguments.floats())
        actual = run(case.triton, late)
    torch.cuda.synchronize()
    assert_equal(actual, expected)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@every_case
def test_device_of_the_arguments(case: Case) -> None:
    actual = run(case.triton, case.arguments().map(lambda x: x.to("cuda:1")))
    assert {x.device for x in actual} == {torch.device("cuda:1")}
    assert_equal([x.to(DEVICE) for x in actual], run(case.triton, case.arguments()))


@pytest.mark.gpu
@every_case
def test_cuda_graph(case: Case) -> None:
    arguments = case.arguments()

    def step() -> list[Tensor]:
        return run(case.triton, arguments.map(torch.clone))

    on_side_stream(step)
    graph, results = captured(step)
    with torch.no_grad():
        torch._foreach_mul_(arguments.floats(), -0.5)
    graph.replay()
    assert_equal(results, step())
