"""Every kernel of every recipe, compiled for GPUs that need not be there.

The interpreter runs what a compiler refuses; this is what a machine without a GPU can tell of the
compiled code. One process compiles, without the interpreter; the tests read what it wrote.
"""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

import fastllama_kernels
from benchmarks.compile_table import RESERVED_SHARED_BYTES, SHARED_BYTES, CompiledKernel

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "compile_table.py"


def compile_table(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script without the interpreter, unless `environment` says otherwise."""
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *options],
        env=inherited | {"PYTHONPATH": ":".join(sys.path)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[CompiledKernel]:
    folder = tmp_path_factory.mktemp("compiled")
    path = folder / "kernels.json"
    done = compile_table("--json", str(path), TRITON_CACHE_DIR=str(folder / "cache"))
    assert done.returncode == 0, done.stderr
    return [CompiledKernel(**fields) for fields in json.loads(path.read_text())]


def test_no_kernel_is_left_out(kernels: list[CompiledKernel]) -> None:
    compiled = {kernel.kernel for kernel in kernels}
    assert compiled == entry_points(Path(fastllama_kernels.__file__).parent)


def entry_points(folder: Path) -> set[str]:
    """Names of the functions under `@triton.jit` that no other such function calls."""
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


def test_nothing_is_spilled(kernels: list[CompiledKernel]) -> None:
    assert_none(k for k in kernels if k.spill_store_bytes or k.spill_load_bytes)


def test_shared_memory_fits(kernels: list[CompiledKernel]) -> None:
    assert_none(
        k for k in kernels if k.shared_bytes > SHARED_BYTES[k.architecture] - RESERVED_SHARED_BYTES
    )


def test_arithmetic_is_at_most_float32(kernels: list[CompiledKernel]) -> None:
    assert_none(k for k in kernels if k.has_float64)


def test_sums_have_one_order(kernels: list[CompiledKernel]) -> None:
    assert_none(k for k in kernels if k.has_atomics)


def test_rows_are_read_128_bits_at_a_time(kernels: list[CompiledKernel]) -> None:
    # Without an exception, because 128 bits divide the rows of all recipes; so below.
    assert_none(k for k in kernels if not k.wide_loads)


def test_rows_are_written_128_bits_at_a_time(kernels: list[CompiledKernel]) -> None:
    assert_none(k for k in kernels if not k.wide_stores and not writes_scalars_only(k))


def writes_scalars_only(kernel: CompiledKernel) -> bool:
    """Without the gradient, the cross-entropy of a row is two numbers."""
    return kernel.kernel == "_cross_entropy_fwd_kernel" and not kernel.constants["WRITE_GRADIENT"]


def test_next_rows_are_loaded_ahead(kernels: list[CompiledKernel]) -> None:
    asked = [k for k in kernels if k.constants.get("NUM_STAGES", 1) > 1]
    # A row that does not fit in a block is read twice, in loops that are not pipelined.
    pipelined = [k for k in asked if k.constants["D"] <= k.constants["BLOCK"]]
    assert pipelined
    assert_none(k for k in pipelined if not k.async_copies)


def assert_none(failing: Iterable[CompiledKernel]) -> None:
    """Fail with all there is to know of each, one a line."""
    lines = [str(kernel) for kernel in failing]
    assert not lines, "\n".join(lines)


def test_the_interpreter_compiles_nothing() -> None:
    done = compile_table("--markdown", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert done.stderr == "TRITON_INTERPRET is set, so nothing can be compiled; unset it.\n"
