"""Counts in SASS, the machine code of a kernel: instructions and wide accesses, loop by loop."""

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import triton

NVDISASM = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(\S+)\s*(.*?);?\s*$")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_WIDE = re.compile(r"^(LDG|LDGSTS|STG)\b\S*\.(128|256)\b")


@dataclass(frozen=True)
class Region:
    """The code outside of loops, or the body of a loop without the loops inside it."""

    parent: int | None
    """Index of the region around it; None for the code outside of loops, the first region."""
    instructions: int
    """Of a warp, in one pass."""
    loaded: int
    """Bytes that a thread loads from global memory, in accesses of at least 128 bits, in a pass."""
    stored: int
    """Bytes that it stores in such accesses."""


def disassemble(cubin: bytes) -> str:
    """Return the SASS of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [NVDISASM, "-c", file.name], capture_output=True, text=True, check=True
        )
    return done.stdout


def regions(sass: str) -> list[Region]:
    """Return the regions of a kernel.

    Every instruction counts, also where a predicate or a branch may skip it; a subroutine counts
    once. Not counted is the padding after the kernel.
    """
    names, targets, labels = _parse(sass)
    loops = sorted(
        {
            (labels[target], index)
            for index, target in enumerate(targets)
            # A branch to itself is the padding.
            if target is not None and labels[target] < index
        },
        key=lambda loop: (loop[0], -loop[1]),
    )
    around = [_innermost(loops, index) for index in range(len(names))]
    found = []
    for number, loop in enumerate([None, *loops]):
        own = [name for name, inside in zip(names, around, strict=True) if inside == loop]
        outer = None if loop is None else _innermost(loops[: number - 1], loop[0])
        found.append(
            Region(
                parent=None if loop is None else 0 if outer is None else loops.index(outer) + 1,
                instructions=len(own),
                loaded=_wide_bytes(own, "LDG"),
                stored=_wide_bytes(own, "STG"),
            )
        )
    return found


def _parse(sass: str) -> tuple[list[str], list[str | None], dict[str, int]]:
    """Return opcodes, targets of branches, and the instruction that follows each label."""
    names: list[str] = []
    targets: list[str | None] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(names)
        elif instruction := _INSTRUCTION.match(line):
            name, operands = instruction.groups()
            target = _TARGET.search(operands) if name.startswith("BRA") else None
            names.append(name.rstrip(";"))
            targets.append(target[1] if target else None)
    last = max(index for index, name in enumerate(names) if name.startswith(("EXIT", "RET")))
    return names[: last + 1], targets[: last + 1], labels


def _innermost(loops: Sequence[tuple[int, int]], index: int) -> tuple[int, int] | None:
    around = [loop for loop in loops if loop[0] <= index <= loop[1]]
    return min(around, key=lambda loop: loop[1] - loop[0], default=None)


def _wide_bytes(names: Sequence[str], kind: str) -> int:
    matches = (_WIDE.match(name) for name in names)
    return sum(int(m[2]) // 8 for m in matches if m and m[1].startswith(kind))
