"""Compile every Triton kernel of the recipes for three GPU architectures, without a GPU.

    python benchmarks/compile_table.py [--markdown] [--json FILE]

The command calls the operators on small CPU tensors of the recipes' widths. A fake driver stands in
for each GPU, and a hook intercepts every launch at the point where Triton would compile it. The
compiled kernels are therefore exactly the launched ones, with the dtypes, constants and alignments
that Triton derives. Registers and spills come from ptxas. Instructions are counted in the PTX, each
once, however often it runs. Warps per multiprocessor are computed from these numbers.
"""

import argparse
import dataclasses
import importlib
import io
import json
import multiprocessing
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from fastllama.config import ModelConfig, load_recipe
from fastllama_kernels import TRITON, _library

RECIPES = Path(__file__).parents[1] / "configs"
# Compute capabilities: A100; H100 and H200; B200.
ARCHITECTURES = (80, 90, 100)
TABLE_ARCHITECTURE = 90
# Shared memory of one multiprocessor in bytes. Each program occupies 1 KiB more than it requests.
SHARED_BYTES = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
RESERVED_SHARED_BYTES = 1024
# Tokens. Training only has counts divisible by 16; Triton specialises on that.
ROWS = 16
DTYPE = torch.bfloat16
LOSS_OPTIONS = {"label_smoothing": 0.1, "z_loss": 1e-4, "softcap": 30.0}


@dataclass(frozen=True)
class Launch:
    """The properties of a launch that determine the code Triton compiles."""

    module: str
    kernel: str
    architecture: int
    """Compute capability, such as 90 for 9.0."""
    specialization: str
    """JSON for `JITFunction.preload`: types, constants, alignments, options and target."""


@dataclass(frozen=True)
class CompiledKernel:
    """Compilation result of one kernel in one configuration for one GPU."""

    module: str
    kernel: str
    architecture: int
    """Compute capability, such as 90 for 9.0."""
    constants: dict[str, Any]
    """Constexpr parameters, and other parameters specialised as None or 1, by name."""
    dtype: str
    """Narrowest float dtype of the tensors, in Triton's spelling: the activation dtype."""
    warps: int
    registers: int
    """Registers per thread."""
    spill_store_bytes: int
    spill_load_bytes: int
    shared_bytes: int
    """Shared memory per program."""
    warps_per_multiprocessor: int
    """Resident warps of at most 64, from the number of programs that fit."""
    wide_loads: int
    """Global loads of at least 128 bits per thread, asynchronous copies included."""
    wide_stores: int
    """Global stores of at least 128 bits per thread."""
    async_copies: int
    """Asynchronous copies (cp.async) of any width from global to shared memory."""
    has_float64: bool
    has_atomics: bool


# --- Recording launches ---------------------------------------------------------------------------


def _train_rms_norm(model: ModelConfig) -> None:
    x, weight = _leaf(ROWS, model.n_embd), _leaf(model.n_embd)
    projection = _leaf(ROWS, model.n_embd)
    for residual in (None, _leaf(ROWS, model.n_embd)):
        _backward(*TRITON.add_rms_norm(x, residual, weight, model.eps))
        _backward(*TRITON.add_rms_norm_linear(x, residual, weight, model.eps, projection))


def _train_rope(model: ModelConfig) -> None:
    qkv = _leaf(1, ROWS, (model.n_heads + 2 * model.kv_heads) * model.head_width)
    table = torch.ones(ROWS, model.head_width // 2)
    for positions in (None, torch.zeros(1, ROWS, dtype=torch.int64)):
        _backward(*TRITON.rope(qkv, table, table, model.n_heads, model.kv_heads, positions))


def _train_swiglu(model: ModelConfig) -> None:
    gate_up, down = _leaf(ROWS, 2 * model.ffn_width), _leaf(ROWS, model.ffn_width)
    _backward(TRITON.swiglu(gate_up))
    _backward(TRITON.swiglu_linear(gate_up, down))


def _train_cross_entropy(model: ModelConfig) -> None:
    targets = torch.zeros(ROWS, dtype=torch.int64)
    for options in ({}, LOSS_OPTIONS):
        for inplace, reduction in product((False, True), ("mean", "none")):
            loss, _ = TRITON.cross_entropy(
                _leaf(ROWS, model.vocab_size),
                targets,
                reduction=reduction,
                inplace=inplace,
                **options,
            )
            _backward(loss)


def _train_linear_cross_entropy(model: ModelConfig) -> None:
    # The width of hidden only matters to PyTorch's matmuls, not to a kernel.
    hidden, weight = _leaf(ROWS, ROWS), _leaf(model.vocab_size, ROWS)
    targets = torch.zeros(ROWS, dtype=torch.int64)
    for options in ({}, LOSS_OPTIONS):
        _backward(TRITON.linear_cross_entropy(hidden, weight, targets, **options))


OPERATORS: tuple[Callable[[ModelConfig], None], ...] = (
    _train_rms_norm,
    _train_rope,
    _train_swiglu,
    _train_cross_entropy,
    _train_linear_cross_entropy,
)
"""One function per operator: runs all variants, forward and backward, at a model's widths."""


def _leaf(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=DTYPE, requires_grad=True)


def _backward(*outputs: Tensor) -> None:
    torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])


class FakeGPU:
    """The part of a Triton driver that compilation needs."""

    def __init__(self, architecture: int) -> None:
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        """One device id per architecture, because a kernel caches the target by device id."""
        return int(self.target.arch)

    def get_current_stream(self, device: int) -> int:
        return 0


def record_launches(models: Iterable[ModelConfig], architecture: int) -> list[Launch]:
    """Return the distinct launches of training `models` on a GPU, without running them.

    This process cannot launch kernels afterwards.
    """
    launches: dict[Launch, None] = {}

    def record(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        kernel = fn.jit_function
        specialization = compile["specialization_data"]
        launches[Launch(fn.module, kernel.__name__, architecture, specialization)] = None
        return True  # Tells Triton to skip compilation and launch.

    driver.set_active(FakeGPU(architecture))
    knobs.runtime.jit_cache_hook = record
    _library.INTERPRETED = True  # Lets CPU tensors reach the launch.
    for model in models:
        for train in OPERATORS:
            train(model)
    return list(launches)


# --- Compilation ----------------------------------------------------------------------------------


def compile_launch(launch: Launch) -> CompiledKernel:
    """Compile `launch` for its GPU, bypassing Triton's cache, and collect the statistics.

    Raises:
        RuntimeError: the kernel does not compile.
    """
    driver.set_active(FakeGPU(launch.architecture))
    knobs.compilation.always_compile = True
    knobs.nvidia.dump_ptxas_log = True  # To stdout.
    kernel = getattr(importlib.import_module(launch.module), launch.kernel)
    data = json.loads(launch.specialization)
    constants = _constants(kernel.arg_names, data)
    log = io.StringIO()
    try:
        with redirect_stdout(log):
            binary = kernel.preload(launch.specialization)
    except Exception as error:  # Not all of Triton's exceptions can be pickled to the parent.
        raise RuntimeError(
            f"{launch.kernel} with {constants} does not compile for sm_{launch.architecture}: "
            f"{error}"
        ) from None
    ptx = binary.asm["ptx"]
    pointers = [kind for kind in data["signature"].values() if re.match(r"\*(bf|fp)", kind)]
    warps, shared_bytes = data["options"]["num_warps"], binary.metadata.shared
    registers = max(_find_ints(r"Used (\d+) registers", log.getvalue()))
    return CompiledKernel(
        module=launch.module,
        kernel=launch.kernel,
        architecture=launch.architecture,
        constants=constants,
        dtype=min(pointers, key=lambda kind: int(kind[3:]))[1:],
        warps=warps,
        registers=registers,
        spill_store_bytes=sum(_find_ints(r"(\d+) bytes spill stores", log.getvalue())),
        spill_load_bytes=sum(_find_ints(r"(\d+) bytes spill loads", log.getvalue())),
        shared_bytes=shared_bytes,
        warps_per_multiprocessor=resident_warps(
            launch.architecture, warps, registers, shared_bytes
        ),
        wide_loads=_count_wide("ld", ptx) + len(re.findall(r"\bcp\.async\.cg\.shared", ptx)),
        wide_stores=_count_wide("st", ptx),
        async_copies=len(re.findall(r"\bcp\.async\.c[ag]\.shared", ptx)),
        has_float64=".f64" in ptx,
        has_atomics=re.search(r"\b(atom|red)\.", ptx) is not None,
    )


def _constants(names: Sequence[str], data: dict[str, Any]) -> dict[str, Any]:
    indices = [path[0] for path in data["constant_keys"]]
    return {
        names[index]: value for index, value in zip(indices, data["constant_vals"], strict=True)
    }


def _find_ints(pattern: str, log: str) -> list[int]:
    return [int(number) for number in re.findall(pattern, log)]


def _count_wide(operation: str, ptx: str) -> int:
    """Count vector instructions of at least 128 bits, such as `ld.global.L1::evict_last.v4.b32`."""
    vectors = re.findall(rf"\b{operation}\.global[\w.:]*\.v(\d)\.[bfsu](\d+)", ptx)
    return sum(int(length) * int(bits) >= 128 for length, bits in vectors)


def resident_warps(architecture: int, warps: int, registers: int, shared_bytes: int) -> int:
    """Resident warps of at most 64 per multiprocessor, for programs of `warps` warps.

    Each of the four quarters of a multiprocessor has 16,384 registers, allocated to warps in units
    of 256. At most 32 programs are resident.
    """
    registers_of_warp = 32 * 8 * -(-registers // 8)
    programs = min(
        32,
        min(64, 4 * (16_384 // registers_of_warp)) // warps,
        SHARED_BYTES[architecture] // (shared_bytes + RESERVED_SHARED_BYTES),
    )
    return programs * warps


def compile_recipes() -> list[CompiledKernel]:
    """Compile all launches of training the recipes in configs, on all CPU cores."""
    models = {load_recipe(path).model for path in RECIPES.glob("*.toml")}
    by_width = sorted(models, key=lambda model: (model.n_embd, model.ffn_width))
    launches = [
        launch
        for architecture in ARCHITECTURES
        for launch in record_launches(by_width, architecture)
    ]
    # Spawn: forking is unsafe with PyTorch's threads.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=spawn) as pool:
        return list(pool.map(compile_launch, launches))


# --- Table ----------------------------------------------------------------------------------------

HEADINGS = (
    "kernel",
    "configuration",
    "type",
    "warps",
    "registers",
    "shared bytes",
    "warps per SM",
    "128-bit loads + stores",
    "cp.async",
)
CAPTION = (
    f"sm_{TABLE_ARCHITECTURE}, {DTYPE}; in brackets the highest register count on "
    f"{', '.join(f'sm_{architecture}' for architecture in ARCHITECTURES)}, where it is higher"
)


def table_rows(kernels: Iterable[CompiledKernel]) -> list[tuple[str, ...]]:
    """Cells of the table rows, grouped by kernel."""
    variants: dict[str, list[CompiledKernel]] = defaultdict(list)
    for kernel in kernels:
        variants[kernel.kernel].append(kernel)
    return [row for group in variants.values() for row in _rows_of_kernel(group)]


def _rows_of_kernel(variants: Sequence[CompiledKernel]) -> list[tuple[str, ...]]:
    """Rows of one kernel. Variants with equal results that differ only in numbers share a row."""
    most_registers: dict[str, int] = defaultdict(int)
    for kernel in variants:
        configuration = str(kernel.constants)
        most_registers[configuration] = max(most_registers[configuration], kernel.registers)
    names = _distinguishing_constants(variants)
    numbers: dict[tuple[str, ...], list[dict[str, int]]] = defaultdict(list)
    for kernel in variants:
        if kernel.architecture == TABLE_ARCHITECTURE:
            constants = {name: _constant(kernel, name) for name in names}
            results = _results(kernel, most_registers[str(kernel.constants)])
            numbers[_switches(constants), *results].append(_numbers(constants))
    name = variants[0].kernel.strip("_").removesuffix("_kernel")
    return [
        (name, " · ".join(filter(None, (_join(group), switches))), *results)
        for (switches, *results), group in numbers.items()
    ]


def _distinguishing_constants(variants: Sequence[CompiledKernel]) -> list[str]:
    """Constants that differ between variants, except numbers determined by an earlier constant."""
    distinct: list[str] = []
    for name in dict.fromkeys(name for kernel in variants for name in kernel.constants):
        values = [_constant(kernel, name) for kernel in variants]
        follows = _is_number(values[0]) and any(
            len(set(zip(earlier, values, strict=True))) == len(set(earlier))
            for earlier in ([_constant(kernel, other) for kernel in variants] for other in distinct)
        )
        if len(set(values)) > 1 and not follows:
            distinct.append(name)
    return distinct


def _constant(kernel: CompiledKernel, name: str) -> Any:
    """Value of a constant; True for an argument that is None only in other variants."""
    return kernel.constants.get(name, True)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _numbers(constants: dict[str, Any]) -> dict[str, int]:
    return {name: value for name, value in constants.items() if _is_number(value)}


def _switches(constants: dict[str, Any]) -> str:
    """Names of enabled switches and given arguments: `HAS_RESIDUAL · RECOMPUTE`."""
    return " · ".join(
        name.removesuffix("_ptr")
        for name, value in constants.items()
        if value and not _is_number(value)
    )


def _join(group: Sequence[dict[str, int]]) -> str:
    """Numbers of a group by name: `H 4, 32 · G 4, 8`."""
    return " · ".join(
        f"{name} {', '.join(str(value) for value in sorted({numbers[name] for numbers in group}))}"
        for name in group[0]
    )


def _results(kernel: CompiledKernel, most_registers: int) -> tuple[str, ...]:
    more = f" ({most_registers})" if most_registers > kernel.registers else ""
    return (
        kernel.dtype,
        str(kernel.warps),
        f"{kernel.registers}{more}",
        f"{kernel.shared_bytes:,}",
        str(kernel.warps_per_multiprocessor),
        f"{kernel.wide_loads} + {kernel.wide_stores}",
        str(kernel.async_copies),
    )


def print_markdown(rows: Iterable[Sequence[str]]) -> None:
    alignment = [":--", ":--", ":--"] + ["--:"] * (len(HEADINGS) - 3)
    for cells in (HEADINGS, alignment, *rows):
        print("| " + " | ".join(cells) + " |")


def print_table(rows: Iterable[Sequence[str]]) -> None:
    table = Table(caption=CAPTION)
    for number, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if number < 3 else "right")
    for cells in rows:
        table.add_row(*cells)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--json", type=Path, help="write the results for every GPU to this file")
    options = parser.parse_args()
    if _library.INTERPRETED:
        parser.exit(2, "TRITON_INTERPRET is set, so nothing can be compiled; unset it.\n")
    kernels = compile_recipes()
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(kernel) for kernel in kernels]))
    (print_markdown if options.markdown else print_table)(table_rows(kernels))


if __name__ == "__main__":
    main()
