"""Compiles every kernel of the recipes for three GPU architectures, without a GPU.

The operators run on small CPU tensors of the recipes' widths. A fake driver stands in for each GPU,
and a hook intercepts every launch at the point where Triton would compile it. The compiled kernels
are therefore exactly the launched ones, with the dtypes, constants and alignments that Triton
derives. Registers and spills come from ptxas.
"""

import importlib
import io
import json
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from itertools import chain
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from benchmarks.counts.launches import OPERATORS, SEQ_LEN, WITH_OPTIONS, label, models
from benchmarks.counts.sass import Region, disassemble, regions
from fastllama_kernels import _library

# Compute capabilities: A100; H100 and H200; B200.
ARCHITECTURES = (80, 90, 100)
# Shared memory of one multiprocessor in bytes. Each program occupies 1 KiB more than it requests.
SHARED_BYTES = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
RESERVED_SHARED_BYTES = 1024


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

    kernel: str
    architecture: int
    """Compute capability, such as 90 for 9.0."""
    constants: dict[str, Any]
    """Constexpr parameters, and other parameters specialised as None or 1, by name."""
    pointers: dict[str, str]
    """Dtypes of the tensors by name, in Triton's spelling."""
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
    regions: list[Region]

    @property
    def label(self) -> str:
        """What matters of the launch, in words."""
        return label(self.kernel, self.constants, self.pointers)


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


def record_launches(architecture: int) -> list[Launch]:
    """Return the distinct launches of training the recipes on a GPU, without running them.

    This process cannot launch kernels afterwards.
    """

    def train_all() -> None:
        for model in models():
            # Options that no recipe sets are compiled for one GPU.
            for train in (*OPERATORS, *(WITH_OPTIONS if architecture == 90 else ())):
                train(model, SEQ_LEN)

    return record(train_all, architecture)


def record(run: Callable[[], object], architecture: int) -> list[Launch]:
    """Return the distinct launches of `run` on a GPU, on CPU tensors and without running them.

    This process cannot launch kernels afterwards.
    """
    launches: dict[Launch, None] = {}

    def add(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        kernel = fn.jit_function
        specialization = compile["specialization_data"]
        launches[Launch(fn.module, kernel.__name__, architecture, specialization)] = None
        return True  # Tells Triton to skip compilation and launch.

    driver.set_active(FakeGPU(architecture))
    knobs.runtime.jit_cache_hook = add
    _library.INTERPRETED = True  # Lets CPU tensors reach the launch.
    run()
    return list(launches)


def compile_launch(launch: Launch) -> CompiledKernel:
    """Compile `launch` for its GPU, bypassing Triton's cache, and collect the statistics.

    Raises:
        RuntimeError: the kernel does not compile.
    """
    driver.set_active(FakeGPU(launch.architecture))
    knobs.runtime.jit_cache_hook = None
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
    pointers = {name: kind[1:] for name, kind in data["signature"].items() if kind.startswith("*")}
    warps, shared_bytes = data["options"]["num_warps"], binary.metadata.shared
    registers = max(_find_ints(r"Used (\d+) registers", log.getvalue()))
    return CompiledKernel(
        kernel=launch.kernel,
        architecture=launch.architecture,
        constants=constants,
        pointers=pointers,
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
        regions=regions(disassemble(binary.asm["cubin"])),
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
    """Compile all launches of training the recipes in configs, on all CPU cores.

    Raises:
        RuntimeError: a kernel does not compile.
    """
    with compilers() as pool:
        launches = chain.from_iterable(pool.map(record_launches, ARCHITECTURES))
        return list(pool.map(compile_launch, launches))


@contextmanager
def compilers() -> Iterator[ProcessPoolExecutor]:
    """Yield processes that have Triton's compiler, where this one may have its interpreter."""
    n_processes = os.cpu_count() or 1
    # Spawn: forking is unsafe with PyTorch's threads.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(n_processes, mp_context=spawn) as pool:
        before = os.environ.get("TRITON_INTERPRET")
        os.environ["TRITON_INTERPRET"] = "0"
        # Each starts a process. Triton reads the variable there when it is imported.
        for _ in range(n_processes):
            pool.submit(os.getpid)
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
        yield pool
