"""Every kernel of every recipe, compiled for three GPUs on a machine that needs none.

The interpreter also runs code that the compiler rejects. A process without the interpreter
compiles; the tests read its table.
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
    """Run the script without the interpreter, unless `environment` sets it."""
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
    assert_none(k for k in kernels if not k.wide_stores and not writes_scalars_only(k))


def writes_scalars_only(kernel: CompiledKernel) -> bool:
    """Without the gradient, cross-entropy writes two numbers per row."""
    return kernel.kernel == "_cross_entropy_fwd_kernel" and not kernel.constants["WRITE_GRADIENT"]


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


def test_interpreter_cannot_compile() -> None:
    done = compile_table("--markdown", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert done.stderr == "TRITON_INTERPRET is set, so nothing can be compiled; unset it.\n"
