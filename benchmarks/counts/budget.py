"""Counts of every launch of the recipes beside their floor, and their stored budget.

The floor of a launch is the bytes of the formula in the docstring of its operator. Bytes come from
Triton's interpreter, instructions from the SASS and the numbers of passes through its loops. The
number of passes follows from the bytes that a pass loads.
"""

import math
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import triton

from benchmarks.counts.compiled import CompiledKernel
from benchmarks.counts.launches import recipes
from benchmarks.counts.traffic import Moved
from fastllama.config import Config
from fastllama_kernels.cross_entropy import cached_programs
from fastllama_kernels.linear_cross_entropy import chunk_length
from fastllama_kernels.rms_norm import programs_per_multiprocessor

FILE = Path(__file__).with_name("budget.toml")
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
L2_BYTES = {80: 40 * 2**20, 90: 50 * 2**20, 100: 126 * 2**20}
WIDTHS = {"bf16": 2, "fp32": 4}

MOST_BYTES = 1.02
"""Bytes moved, over the floor."""
MOST_INSTRUCTIONS = 200
"""Instructions of a warp, for each KiB of the floor. A GPU issues at most four a clock and
multiprocessor. By published clocks and bandwidths these are about 320 while the memory of an H100
moves a KiB, 220 on an H200, and 140 on a B200, where some launches need more."""
GROWTH = 1.02
"""How much a count may grow over the stored one."""

SUM_OF_PROGRAMS = "_rms_norm_dweight_kernel"
"""Its rows are the sums of programs: as many as the GPU runs, whatever the rows of a batch."""

EXCEPTIONS = {
    # One of a micro-batch's 65 launches: 264 partial sums of the weight gradient, float32, beside
    # 3 x 8,192 rows. Fewer programs would have fewer sums, but not fill an H100.
    ("rms_norm_bwd, D 4096", "moved"): 1.03,
}
"""Other limits, by launch and count."""


@dataclass(frozen=True)
class Count:
    """What is counted of a launch."""

    label: str
    architecture: int
    """Compute capability, such as 90 for 9.0."""
    moved: float
    """Bytes moved, over the floor."""
    instructions: float
    """Instructions of a warp for each KiB of the floor, masked lanes and skipped ones included."""
    registers: int
    warps: int
    """Resident on a multiprocessor, of at most 64."""
    spilled: int
    """Bytes of a thread."""
    in_flight: float
    """KiB that the loads of a multiprocessor ask for at a time, at most."""
    cached: float
    """Share of the L2 cache that holds rows which are read twice."""


Sizes = Mapping[str, Any]

_FLOORS: dict[str, Callable[[Sizes, Mapping[str, int]], float]] = {
    "_rms_norm_fwd_kernel": lambda c, b: (
        c["D"] * (b["x_ptr"] + b["y_ptr"])
        + c["D"] * c["HAS_RESIDUAL"] * (b["residual_ptr"] + b["stream_ptr"])
    ),
    "_rms_norm_bwd_kernel": lambda c, b: (
        c["D"] * (b["dy_ptr"] + b["stream_ptr"] + b["dx_ptr"])
        + c["D"] * (c["HAS_DSTREAM"] * b["dstream_ptr"] + c["RECOMPUTE"] * b["y_ptr"])
    ),
    SUM_OF_PROGRAMS: lambda c, b: c["D"] * b["partial_ptr"],
    "_rope_kernel": lambda c, b: 2 * c["N_ROTATED_HEADS"] * 2 * c["R"] * b["qkv_ptr"],
    "_rope_bwd_kernel": lambda c, b: 2 * (c["H"] + 2 * c["G"]) * 2 * c["R"] * b["dqkv_ptr"],
    "_swiglu_fwd_kernel": lambda c, b: 3 * c["F"] * b["h_ptr"],
    "_swiglu_bwd_kernel": lambda c, b: (5 + c["RECOMPUTE"]) * c["F"] * b["h_ptr"],
    "_cross_entropy_fwd_kernel": lambda c, b: (1 + c["WRITE_GRADIENT"]) * c["V"] * b["logits_ptr"],
    "_cross_entropy_bwd_kernel": lambda c, b: 2 * c["V"] * b["logits_ptr"],
    "_scale_kernel": lambda c, b: 2 * c["V"] * b["x_ptr"],
    # For a block of elements.
    "_scaled_kernel": lambda c, b: c["BLOCK"] * (b["x_ptr"] + (1 + c["ADDS"]) * b["out_ptr"]),
}


@dataclass(frozen=True)
class Work:
    """What a program does."""

    floor: float
    """Bytes of a row that the docstring of the operator gives."""
    rows: float
    """Rows of a program; below 1 where several share a row."""
    programs: int | None = None
    """Programs of a launch whose programs loop over rows; None for others."""
    swept: int = 0
    """Bytes of a row that a loop over its columns loads."""
    n_rows: int = 8_192
    """Rows of a launch."""


def work_of(kernel: CompiledKernel) -> Work:
    """Return what a program of one of our kernels does, in the recipe with the most rows."""
    c, name = kernel.constants, kernel.kernel
    widths = {name: WIDTHS.get(dtype, 0) for name, dtype in kernel.pointers.items()}
    work = Work(floor=_FLOORS[name](c, widths), rows=1)
    n_available = MULTIPROCESSORS[kernel.architecture]
    if name.startswith("_rms_norm"):
        n_rows = max(tokens(config) for config in recipes() if config.model.n_embd == c["D"])
        programs = min(n_rows, n_available * programs_per_multiprocessor(c["D"]))
        if name == "_rms_norm_fwd_kernel":
            return replace(work, n_rows=n_rows)
        if name == "_rms_norm_bwd_kernel":
            return replace(work, rows=n_rows / programs, programs=programs, n_rows=n_rows)
        elements = programs * c["BLOCK_COLUMNS"]
        swept = elements * widths["partial_ptr"]
        return replace(work, rows=elements / c["D"], swept=swept, n_rows=programs)
    if name == "_cross_entropy_fwd_kernel":
        swept = c["V"] * widths["logits_ptr"]
        work = replace(work, swept=swept, n_rows=chunk_rows(c["V"]))
        if c["V"] <= c["BLOCK"] or not c["WRITE_GRADIENT"]:
            return work
        programs = cached_programs(n_available, L2_BYTES[kernel.architecture], swept)
        return replace(work, rows=work.n_rows / programs, programs=programs)
    if name in ("_rope_kernel", "_rope_bwd_kernel"):
        n_heads = c.get("N_ROTATED_HEADS") or c["H"] + 2 * c["G"]
        return replace(work, rows=c["BLOCK_ROWS"] * c["BLOCK_HEADS"] / n_heads)
    width = c["BLOCK"] if name == "_scaled_kernel" else c.get("F") or c["V"]
    return replace(work, rows=1 / math.ceil(width / c["BLOCK"]))


def tokens(config: Config) -> int:
    """Tokens of a micro-batch."""
    return config.training.batch_size * config.model.max_seq_len


def chunk_rows(vocab_size: int) -> int:
    """Most rows of a chunk of logits in the recipes."""
    sizes = [tokens(config) for config in recipes() if config.model.vocab_size == vocab_size]
    return chunk_length(max(sizes), vocab_size, 2)


def count(kernel: CompiledKernel, work: Work, moved: Moved | None = None) -> Count:
    """Count a launch. Without `moved` it moves its floor."""
    cached, bytes_of_row = 0.0, work.floor
    if moved is not None:
        # Each program of the norm's backward writes its own sum.
        n_sums = MULTIPROCESSORS[kernel.architecture] if work.programs else 1
        once = moved.read_once + n_sums * moved.written_once
        bytes_of_row = moved.per_row + once / work.n_rows
        if moved.read_again_per_row > 0.01 * work.floor:
            assert work.programs is not None, f"{kernel.label} reads rows twice"
            cached = work.programs * moved.read_again_per_row / L2_BYTES[kernel.architecture]
            bytes_of_row += moved.read_again_per_row if cached > 0.5 else 0
    depth = 2 if kernel.async_copies else 1
    loaded = max(region.loaded for region in kernel.regions)
    return Count(
        label=kernel.label,
        architecture=kernel.architecture,
        moved=bytes_of_row / work.floor,
        instructions=_instructions_of_row(kernel, work) * 1024 / work.floor,
        registers=kernel.registers,
        warps=kernel.warps_per_multiprocessor,
        spilled=kernel.spill_store_bytes + kernel.spill_load_bytes,
        in_flight=kernel.warps_per_multiprocessor * 32 * loaded * depth / 1024,
        cached=cached,
    )


def issued_bytes(kernel: CompiledKernel, work: Work) -> float:
    """Bytes that the wide accesses of the SASS ask for in a row, masked lanes included."""
    own = [
        (region.loaded + region.stored) * passes
        for region, passes in zip(kernel.regions, _passes(kernel, work), strict=True)
    ]
    # Outside of its loop, the norm's backward reads the first rows, and writes its sum.
    return sum(own[1:] if work.programs else own) * 32 * kernel.warps / work.rows


def _instructions_of_row(kernel: CompiledKernel, work: Work) -> float:
    of_warp = sum(
        region.instructions * passes
        for region, passes in zip(kernel.regions, _passes(kernel, work), strict=True)
    )
    return of_warp * kernel.warps / work.rows


def _passes(kernel: CompiledKernel, work: Work) -> list[float]:
    """How often a program runs through each region.

    Raises:
        ValueError: a loop over the columns of a row moves nothing, so nobody knows.
    """
    passes: list[float] = []
    for region in kernel.regions:
        if region.parent is None:
            passes.append(1)
        elif region.parent == 0 and work.programs:
            passes.append(work.rows)
        elif region.loaded:
            n_times = math.ceil(work.swept / (region.loaded * 32 * kernel.warps))
            passes.append(n_times * passes[region.parent])
        elif region.stored:
            # Liger fills the gradient of an ignored row.
            passes.append(0)
        else:
            raise ValueError(f"{kernel.label} has a loop that moves nothing.")
    return passes


def read_budget() -> dict[str, dict[str, Any]]:
    """The stored counts of each launch, by label and architecture."""
    return {**_stored()["launch"]}


def has_budget() -> bool:
    """Whether the stored counts are of this version of Triton; others compile other code."""
    return bool(_stored()["triton"] == triton.__version__)


def _stored() -> dict[str, Any]:
    if not FILE.exists():
        return {"triton": triton.__version__, "launch": {}}
    return tomllib.loads(FILE.read_text())


def write_budget(counts: Iterable[Count]) -> None:
    """Replace the stored counts."""
    lines = [
        "# Counts of every kernel launch of the recipes: python -m benchmarks.counts --update",
        "# moved: bytes over the floor. instructions: of a warp, for each KiB of the floor.",
    ]
    lines += [f'triton = "{triton.__version__}"']
    previous = ""
    for found in sorted(counts, key=lambda found: (found.label, found.architecture)):
        if found.label != previous:
            lines += ["", f'[launch."{found.label}"]']
            previous = found.label
        lines.append(
            f"sm_{found.architecture} = {{ moved = {found.moved:.3f}, "
            f"instructions = {found.instructions:.1f} }}"
        )
    FILE.write_text("\n".join(lines) + "\n")


def faults(found: Count, budget: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """One sentence for each count that is above its limit, or grew."""
    name = f"{found.label}, sm_{found.architecture}"
    if found.spilled:
        yield f"{name} spills {found.spilled} bytes of a thread"
    if found.cached > 0.5:
        yield f"{name} reads again rows that fill {found.cached:.0%} of the L2 cache"
    if found.label not in budget:
        yield f"{name} has no budget; store it with --update"
    for what, value, limit in (
        ("moved", found.moved, MOST_BYTES),
        ("instructions", found.instructions, MOST_INSTRUCTIONS),
    ):
        stored = budget.get(found.label, {}).get(f"sm_{found.architecture}", {}).get(what)
        most = EXCEPTIONS.get((found.label, what), limit)
        if value > most:
            yield f"{name}: {what} is {value:.3f}, and the limit {most}"
        if stored is not None and value > GROWTH * stored:
            yield f"{name}: {what} grew from {stored} to {value:.3f}"
