"""Counts of every launch of the recipes beside their floor, and their stored budget.

The floor of a launch is the bytes of the formula in the docstring of its operator. Bytes come from
Triton's interpreter, instructions from the SASS and the numbers of passes through its loops. The
number of passes follows from the bytes that a pass loads.
"""

import math
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.counts.compiled import CompiledKernel
from benchmarks.counts.launches import recipes
from benchmarks.counts.traffic import Moved
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
"""Instructions of a warp, for each KiB of the floor. While its memory moves a KiB, an H100 issues
about 316, an H200 about 221."""
GROWTH = 1.02
"""How much a count may grow over the stored one."""


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


def floor_bytes(kernel: CompiledKernel) -> float:
    """Bytes of a row that the docstring of the operator gives."""
    widths = {name: WIDTHS.get(dtype, 0) for name, dtype in kernel.pointers.items()}
    return _FLOORS[kernel.kernel](kernel.constants, widths)


def count(kernel: CompiledKernel, moved: Moved | None) -> Count:
    """Count a launch. Without `moved` it moves its floor."""
    floor, n_rows = floor_bytes(kernel), _rows(kernel)
    programs = _programs(kernel)
    cached, bytes_of_row = 0.0, floor
    if moved is not None:
        # Each program of the norm's backward writes its own sum.
        n_sums = 1 if programs is None else MULTIPROCESSORS[kernel.architecture]
        once = moved.read_once + n_sums * moved.written_once
        bytes_of_row = moved.per_row + once / n_rows
        if moved.read_again_per_row > 0.01 * floor:
            assert programs is not None, f"{kernel.label} reads rows twice"
            cached = programs * moved.read_again_per_row / L2_BYTES[kernel.architecture]
            bytes_of_row += moved.read_again_per_row if cached > 0.5 else 0
    depth = 2 if kernel.async_copies else 1
    loaded = max(region.loaded for region in kernel.regions)
    return Count(
        label=kernel.label,
        architecture=kernel.architecture,
        moved=bytes_of_row / floor,
        instructions=_instructions_of_row(kernel) * 1024 / floor,
        registers=kernel.registers,
        warps=kernel.warps_per_multiprocessor,
        spilled=kernel.spill_store_bytes + kernel.spill_load_bytes,
        in_flight=kernel.warps_per_multiprocessor * 32 * loaded * depth / 1024,
        cached=cached,
    )


def issued_bytes(kernel: CompiledKernel) -> float:
    """Bytes that the wide accesses of the SASS ask for in a row, masked lanes included."""
    own = [
        (region.loaded + region.stored) * passes
        for region, passes in zip(kernel.regions, _passes(kernel), strict=True)
    ]
    # Outside of its loop, the norm's backward reads the first rows, and writes its sum.
    return (
        sum(own[1:] if _has_row_loop(kernel) else own)
        * 32
        * kernel.warps
        / _rows_of_program(kernel)
    )


def _instructions_of_row(kernel: CompiledKernel) -> float:
    of_warp = sum(
        region.instructions * passes
        for region, passes in zip(kernel.regions, _passes(kernel), strict=True)
    )
    return of_warp * kernel.warps / _rows_of_program(kernel)


def _passes(kernel: CompiledKernel) -> list[float]:
    """How often a program runs through each region.

    Raises:
        ValueError: a loop over the columns of a row loads nothing, so nobody knows.
    """
    passes: list[float] = []
    for region in kernel.regions:
        if region.parent is None:
            passes.append(1)
        elif region.parent == 0 and _has_row_loop(kernel):
            passes.append(_rows_of_program(kernel))
        elif region.loaded:
            row = kernel.constants["V"] * WIDTHS[kernel.pointers["logits_ptr"]]
            n_times = math.ceil(row / (region.loaded * 32 * kernel.warps))
            passes.append(n_times * passes[region.parent])
        else:
            raise ValueError(f"{kernel.label} has a loop that loads nothing.")
    return passes


def _has_row_loop(kernel: CompiledKernel) -> bool:
    return _programs(kernel) is not None


def _programs(kernel: CompiledKernel) -> int | None:
    """Programs of a launch whose programs loop over rows; None for others."""
    constants, n_available = kernel.constants, MULTIPROCESSORS[kernel.architecture]
    if kernel.kernel == "_rms_norm_bwd_kernel":
        return min(_rows(kernel), n_available * programs_per_multiprocessor(constants["D"]))
    is_wide = constants.get("WRITE_GRADIENT") and constants["V"] > constants["BLOCK"]
    if kernel.kernel == "_cross_entropy_fwd_kernel" and is_wide:
        row = constants["V"] * WIDTHS[kernel.pointers["logits_ptr"]]
        return cached_programs(n_available, L2_BYTES[kernel.architecture], row)
    return None


def _rows(kernel: CompiledKernel) -> int:
    """Most rows of a launch in the recipes."""
    constants, sizes = kernel.constants, []
    for config in recipes():
        n_tokens = config.training.batch_size * config.model.max_seq_len
        if constants.get("D") == config.model.n_embd:
            sizes.append(n_tokens)
        if constants.get("V") == config.model.vocab_size:
            sizes.append(chunk_length(n_tokens, config.model.vocab_size, 2))
    # Rope reads its tables once.
    return max(sizes, default=8_192)


def _rows_of_program(kernel: CompiledKernel) -> float:
    constants, programs = kernel.constants, _programs(kernel)
    if programs is not None:
        return _rows(kernel) / programs
    if kernel.kernel in ("_rope_kernel", "_rope_bwd_kernel"):
        n_heads = constants.get("N_ROTATED_HEADS") or constants["H"] + 2 * constants["G"]
        return float(constants["BLOCK_ROWS"] * constants["BLOCK_HEADS"] / n_heads)
    if kernel.kernel in ("_rms_norm_fwd_kernel", "_cross_entropy_fwd_kernel", "_scaled_kernel"):
        return 1
    width = constants.get("F") or constants["V"]
    return 1 / math.ceil(width / constants["BLOCK"])


def read_budget() -> dict[str, dict[str, Any]]:
    """The stored counts of each launch, by label and architecture."""
    return tomllib.loads(FILE.read_text()) if FILE.exists() else {}


def write_budget(counts: Iterable[Count]) -> None:
    """Replace the stored counts."""
    lines = [
        "# Counts of every kernel launch of the recipes: python -m benchmarks.counts --update",
        "# moved: bytes over the floor. instructions: of a warp, for each KiB of the floor.",
    ]
    previous = ""
    for found in sorted(counts, key=lambda found: (found.label, found.architecture)):
        if found.label != previous:
            lines += ["", f'["{found.label}"]']
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
    for what, value, most in (
        ("moved", found.moved, MOST_BYTES),
        ("instructions", found.instructions, MOST_INSTRUCTIONS),
    ):
        stored = budget.get(found.label, {}).get(f"sm_{found.architecture}", {}).get(what)
        if value > most and (found.label, what) not in EXCEPTIONS:
            yield f"{name}: {what} is {value:.3f}, and the limit {most}"
        if stored is not None and value > GROWTH * stored:
            yield f"{name}: {what} grew from {stored} to {value:.3f}"


EXCEPTIONS: dict[tuple[str, str], str] = {}
"""Why a launch is above a limit, by label and count."""
