"""Every kernel of every recipe, compiled for three GPUs on a machine that needs none, and counted.

The interpreter also runs code that the compiler rejects. Processes without the interpreter compile.
"""

import ast
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

import fastllama_kernels
from benchmarks.counts.__main__ import count_recipes
from benchmarks.counts.budget import (
    SUM_OF_PROGRAMS,
    Count,
    count,
    faults,
    has_budget,
    issued_bytes,
    read_budget,
    work_of,
)
from benchmarks.counts.compiled import (
    RESERVED_SHARED_BYTES,
    SHARED_BYTES,
    CompiledKernel,
    Launch,
    compile_launch,
    compile_recipes,
    compilers,
    record_launches,
)
from benchmarks.counts.launches import OPERATORS
from benchmarks.counts.traffic import Moved, moved_by_recipes
from fastllama_kernels._tile import row_and_columns

needs_interpreter = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton's interpreter is off on a GPU"
)


needs_budget = pytest.mark.skipif(
    not has_budget(), reason="the counts are stored for another version of Triton"
)


@pytest.fixture(scope="module")
def kernels() -> list[CompiledKernel]:
    return compile_recipes()


@pytest.fixture(scope="module")
def moved() -> dict[str, Moved]:
    return moved_by_recipes()


@pytest.fixture(scope="module")
def counts(kernels: list[CompiledKernel], moved: dict[str, Moved]) -> list[Count]:
    return count_recipes(kernels, moved)


def test_every_kernel_is_compiled(kernels: list[CompiledKernel]) -> None:
    compiled = {kernel.kernel for kernel in kernels}
    assert compiled == entry_points(Path(fastllama_kernels.__file__).parent)


def entry_points(folder: Path) -> set[str]:
    """Names of the `@triton.jit` functions that no other `@triton.jit` function calls."""
    defined, called = set(), set()
    for path in folder.glob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and "triton.jit" in map(
                ast.unparse, function.decorator_list
            ):
                defined.add(function.name)
                called |= {
                    call.func.id
                    for call in ast.walk(function)
                    if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
                }
    return defined - called


def test_no_register_spills(kernels: list[CompiledKernel]) -> None:
    assert_none(k for k in kernels if k.spill_store_bytes or k.spill_load_bytes)


def test_shared_memory_fits(kernels: list[CompiledKernel]) -> None:
    assert_none(
        k for k in kernels if k.shared_bytes > SHARED_BYTES[k.architecture] - RESERVED_SHARED_BYTES
    )


def test_no_float64(kernels: list[CompiledKernel]) -> None:
    assert_none(k for k in kernels if k.has_float64)


def test_no_atomics(kernels: list[CompiledKernel]) -> None:
    assert_none(k for k in kernels if k.has_atomics)


def test_128_bit_loads(kernels: list[CompiledKernel]) -> None:
    # No exceptions here and below: 128 bits divide the rows of every recipe.
    assert_none(k for k in kernels if not k.wide_loads)


def test_128_bit_stores(kernels: list[CompiledKernel]) -> None:
    assert_none(k for k in kernels if not k.wide_stores and not writes_little(k))


def writes_little(kernel: CompiledKernel) -> bool:
    """Cross-entropy without the gradient writes three numbers a row, a sum of programs one row."""
    if kernel.kernel == "_cross_entropy_fwd_kernel":
        return not kernel.constants["WRITE_GRADIENT"]
    return kernel.kernel == SUM_OF_PROGRAMS


def test_next_rows_are_prefetched(kernels: list[CompiledKernel]) -> None:
    staged = [k for k in kernels if k.constants.get("NUM_STAGES", 1) > 1]
    # A row wider than a block is read twice, in loops without pipelining.
    pipelined = [k for k in staged if k.constants["D"] <= k.constants["BLOCK"]]
    assert pipelined
    assert_none(k for k in pipelined if not k.async_copies)


def assert_none(failing: Iterable[CompiledKernel]) -> None:
    """Fail and print each kernel on a line."""
    lines = [str(kernel) for kernel in failing]
    assert not lines, "\n".join(lines)


# Counts.


@needs_budget
@needs_interpreter
def test_counts_are_within_their_budget(counts: list[Count]) -> None:
    budget = read_budget()
    assert {found.label for found in counts} == budget.keys()
    assert [sentence for found in counts for sentence in faults(found, budget)] == []


def test_docs_show_the_counts() -> None:
    page = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text()
    table = page[page.index("| launch | bytes / floor") :].split("\n\n")[0].splitlines()[2:]
    budget = read_budget()
    shown = {line.strip("|").split("|")[0].strip(): line for line in table}
    alike = ("positions", "n_valid", "a scale per row")
    assert shown.keys() == {label for label in budget if not label.endswith(alike)}
    for label, line in shown.items():
        moved, instructions = line.strip("|").split("|")[1:3]
        stored = budget[label]["sm_90"]
        assert float(moved.split()[0]) == stored["moved"], label
        assert float(instructions.split()[0]) == pytest.approx(stored["instructions"], abs=0.56)


@needs_interpreter
def test_machine_code_asks_for_the_bytes_that_the_interpreter_sees(
    kernels: list[CompiledKernel], moved: dict[str, Moved]
) -> None:
    for kernel in kernels:
        if kernel.label in moved and kernel.kernel != SUM_OF_PROGRAMS:
            # Positions are loads of 64 bits, which the machine code's count leaves out.
            seen = moved[kernel.label].issued_per_row
            assert issued_bytes(kernel, work_of(kernel)) == pytest.approx(seen, rel=5e-3), (
                kernel.label
            )


@pytest.fixture(scope="module")
def launches() -> list[Launch]:
    with compilers() as pool:
        return pool.submit(record_launches, 90).result()


@pytest.fixture(scope="module")
def compiler() -> Iterator[ProcessPoolExecutor]:
    with compilers() as pool:
        yield pool


def compile_changed(
    launches: list[Launch],
    kernel: str,
    constants: dict[str, object],
    function: str,
    old: str,
    new: str,
) -> CompiledKernel:
    """Compile one of `launches` with `old` replaced by `new` in the source of `function`,
    or in the specialization.

    Runs in a process with the compiler.
    """
    launch = next(
        launch
        for launch in launches
        if launch.kernel == kernel and constants.items() <= constants_of(launch).items()
    )
    if function == "specialization":
        return compile_launch(
            replace(launch, specialization=launch.specialization.replace(old, new))
        )
    changed = getattr(import_module(launch.module), function)
    source = changed.src
    assert old in source
    changed._unsafe_update_src(source.replace(old, new))
    try:
        return compile_launch(launch)
    finally:
        changed._unsafe_update_src(source)


def constants_of(launch: Launch) -> dict[str, object]:
    kernel = getattr(import_module(launch.module), launch.kernel)
    data = json.loads(launch.specialization)
    names = (kernel.arg_names[path[0]] for path in data["constant_keys"])
    return dict(zip(names, data["constant_vals"], strict=True))


LOSS = ("_cross_entropy_fwd_kernel", {"V": 8192, "WRITE_GRADIENT": True, "SOFTCAP": 0.0})
ROPE_BWD = ("_rope_bwd_kernel", {"H": 32, "G": 8, "R": 64, "positions_ptr": None})


@needs_budget
@pytest.mark.parametrize(
    ("kernel", "function", "old", "new", "sentence"),
    [
        (LOSS, "_exp", "tl.exp2(x * _LOG2_E)", "tl.exp(x)", "instructions grew from"),
        (
            ROPE_BWD,
            "_tile",
            "tl.program_id(0)",
            "tl.program_id(0).to(tl.int64)",
            "instructions grew",
        ),
        (LOSS, "specialization", '"maxnreg": null', '"maxnreg": 32', "spills"),
    ],
    ids=["exp for exp2", "division of int64", "too few registers"],
)
def test_slower_code_is_found(
    kernel: tuple[str, dict[str, object]],
    function: str,
    old: str,
    new: str,
    sentence: str,
    launches: list[Launch],
    compiler: ProcessPoolExecutor,
) -> None:
    changed = compiler.submit(compile_changed, launches, *kernel, function, old, new).result()
    assert sentence in "; ".join(faults(count(changed, work_of(changed)), read_budget()))


@pytest.mark.parametrize("stride", ["q_stride_b", "k_stride_t"])
def test_long_strides_compile(
    stride: str, launches: list[Launch], compiler: ProcessPoolExecutor
) -> None:
    # A gradient of 2^31 elements or more in a sequence; those of the other tensors are shorter.
    types = f'"{stride}": "i32"', f'"{stride}": "i64"'
    assert compiler.submit(compile_changed, launches, *ROPE_BWD, "specialization", *types).result()


@triton.jit
def _swiglu_fwd_kernel(gate_up_ptr, h_ptr, F: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The kernel of this name in swiglu.py, but it also reads what it overwrites."""
    row, columns = row_and_columns(F, BLOCK)
    mask = columns < F
    gate = tl.load(gate_up_ptr + row * 2 * F + columns, mask)
    up = tl.load(gate_up_ptr + row * 2 * F + F + columns, mask)
    h_ptr += row * F + columns
    tl.store(h_ptr, gate * up + 0 * tl.load(h_ptr, mask), mask)


@needs_budget
@needs_interpreter
def test_more_bytes_are_found(
    kernels: list[CompiledKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        import_module("fastllama_kernels.swiglu"), "_swiglu_fwd_kernel", _swiglu_fwd_kernel
    )
    name = "swiglu_fwd, F 8192"
    moved = moved_by_recipes([OPERATORS[2]])[name]
    kernel = next(k for k in kernels if k.label == name and k.architecture == 90)
    assert list(faults(count(kernel, work_of(kernel), moved), read_budget())) == [
        f"{name}, sm_90: moved is 1.333, and the limit 1.02",
        f"{name}, sm_90: moved grew from 1.0 to 1.333",
    ]
