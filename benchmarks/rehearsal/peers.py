"""fastllama beside other libraries on the null device: what a micro-batch costs each of them.

    python -m benchmarks.rehearsal.peers [--recipe llama-1b]

Each contender of `benchmarks/training/contenders.py` does an update of one and of three
micro-batches on one device. A micro-batch is half of the difference; the optimizer and what comes
once an update cancel out. Prints a Markdown table. Needs what it compares with: `pip install
transformers liger-kernel torchtitan`.

Bytes are estimated for each of PyTorch's kernels from its template and the size of its launch, for
Liger's from the shapes, and for Inductor's by Inductor.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.rehearsal.build import build, environment
from benchmarks.rehearsal.case import Case
from benchmarks.rehearsal.checks import gib
from benchmarks.rehearsal.kernels import Formula, Shape, kernel_of
from benchmarks.rehearsal.log import LAUNCHES, Call, read_log
from benchmarks.rehearsal.peer import BATCH_SIZE

CONTENDERS = ("fastllama", "torchtitan", "huggingface-liger", "huggingface")
LOADER_WAITS = "cudaEventSynchronize"
"""How the loader's thread, which all contenders use, waits for its copies."""
TYPE_BYTES = {"BFloat16": 2, "float": 4, "long": 8, "bool": 1, "int": 4}
CAST_BYTES = 10 / 3
"""Bytes of an operand where bfloat16 and float32 meet: one of three is bfloat16."""
FORMULAS: dict[str, Formula] = {
    r"reduce_kernel<ReduceOp, (MeanOps|sum_functor), float": lambda s, c: 4 * s.N * s.D,
    r"CatArrayBatchedCopy<OpaqueType": lambda s, c: s.N * (s.H + s.G) * s.K * s.b,
    r"cunn_SoftMaxForward": lambda s, c: 8 * s.N * s.V,
    r"cunn_SoftMaxBackward": lambda s, c: 12 * s.N * s.V,
    r"_rms_norm_forward_kernel": lambda s, c: 2 * s.N * s.D * s.b,
    r"_rms_norm_backward_kernel": lambda s, c: 3 * s.N * s.D * s.b,
    r"_triton_rope": lambda s, c: 2 * s.N * (s.H + s.G) * s.K * s.b,
    r"_swiglu_forward_kernel": lambda s, c: 3 * s.N * s.F * s.b,
    r"_swiglu_backward_kernel": lambda s, c: 5 * s.N * s.F * s.b,
    r"liger_cross_entropy_kernel": lambda s, c: 2 * c.number("grid") * s.V * s.b,
    r"element_mul_kernel": lambda s, c: 2 * c.number("grid") * s.D * s.b,
    r"nll_loss|index|tensor_kernel_scan": lambda s, c: 0,
    r"vectorized_layer_norm_kernel|GammaBetaBackward": lambda s, c: 2 * s.N * s.D * s.b,
    r"layer_norm_grad_input": lambda s, c: 3 * s.N * s.D * s.b,
    # Inductor's kernels: counted where they are called.
    r"triton_": lambda s, c: 0,
}
"""Bytes of kernels that only peers launch, by the beginning of their names."""


def elementwise_bytes(call: Call) -> float | None:
    """Bytes of an elementwise kernel of PyTorch; None for another kernel."""
    loop = re.match(r"(vectorized_|unrolled_)?elementwise_kernel", call.name)
    if loop is None:
        return None
    width = re.search(r"elementwise_kernel<128, (\d)", call.declaration)
    elements = {"vectorized_": 1024, "unrolled_": 512}.get(loop[1]) or 128 * int(
        width[1] if width else 4
    )
    if arrays := re.search(r"array<char\*, (\d)ul>", call.declaration):
        operands = int(arrays[1])
    else:
        # PyTorch takes this kernel for a factor that is broadcast: a norm's, or a rotation's.
        operands = 4 if "where" in call.declaration else 2
        operands += "CUDAFunctor_add" in call.name
    types = re.findall("|".join(TYPE_BYTES), call.name.partition("<")[2])
    casts = "LoadWithCast" in call.declaration or "gpu_kernel_impl<" in call.declaration
    if casts or "bfloat16_copy" in call.name:
        each: float = 3.0 if operands == 2 else CAST_BYTES
    else:
        each = TYPE_BYTES[types[0]] if types else 4
    return operands * each * elements * call.number("grid")


def moved(contender: str, call: Call, shape: Shape) -> float | None:
    """Bytes that a call moves; None where nobody knows."""
    if call.kind == "memcpy":
        return call.number("bytes")
    kernel = kernel_of(call)
    known = None if kernel is None else kernel.moved(shape, call)
    if contender == "fastllama" and not call.name.startswith("triton_"):
        return known
    for pattern, formula in FORMULAS.items():
        if re.match(pattern, call.name):
            return formula(shape, call)
    if call.kind == "triton":
        return None
    n_bytes = elementwise_bytes(call)
    return known if n_bytes is None else n_bytes


@dataclass(frozen=True)
class Cost:
    """What a number of micro-batches costs."""

    launches: int
    waits: int
    """How often the host waits for the device."""
    moved: float | None
    """Bytes; None where a kernel is not counted."""
    peak: int
    """Bytes that are allocated at most, with weights, gradients and AdamW's moments."""


def cost(contender: str, recipe: str, micro_batches: int, libraries: Path, folder: Path) -> Cost:
    """Run an update.

    Raises:
        RuntimeError: the contender fails.
    """
    files = folder / f"{contender} {micro_batches}"
    files.mkdir()
    command = [sys.executable, "-m", "benchmarks.rehearsal.peer", contender, recipe]
    done = subprocess.run(
        [*command, str(micro_batches), str(files)],
        capture_output=True,
        text=True,
        check=False,
        env=environment(
            libraries,
            TORCHINDUCTOR_CACHE_DIR=str(libraries / "inductor"),
            TRITON_CACHE_DIR=str(libraries / "triton"),
            XDG_CACHE_HOME=str(files),
        ),
    )
    if done.returncode:
        raise RuntimeError(f"{contender} fails: {done.stderr.strip().splitlines()[-1]}")
    log = read_log(files / "update.log")
    calls = [call for call in log if call.runs_on_device]
    config = Case(recipe, 1, compiled=True, options={"training.batch_size": BATCH_SIZE}).config()
    shape = Shape.of(config, 1)
    # What comes once an update is the same for any number of micro-batches.
    sizes = [
        moved(contender, call, shape) for call in calls if not call.name.startswith("multi_tensor")
    ]
    inductor = float((files / "inductor").read_text())
    return Cost(
        launches=sum(call.kind in LAUNCHES for call in calls),
        waits=sum(call.kind == "sync" and call.name != LOADER_WAITS for call in log),
        moved=None if None in sizes else inductor + sum(filter(None, sizes)),
        peak=int((files / "peak").read_text()),
    )


def row(contender: str, recipe: str, libraries: Path, folder: Path) -> str:
    """The costs of a micro-batch, as a row of the table."""
    one, three = (cost(contender, recipe, n, libraries, folder) for n in (1, 3))
    moved_text = "not counted"
    if one.moved is not None and three.moved is not None:
        moved_text = f"{(three.moved - one.moved) / 2e9:,.1f}"
    launches, waits = three.launches - one.launches, three.waits - one.waits
    cells = [contender, f"{launches / 2:,.0f}", f"{waits / 2:.0f}", moved_text, gib(three.peak)]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="llama-1b", help="whose shape is trained")
    parser.add_argument(
        "--libraries", type=Path, default=Path(".venv-cuda/null-cuda"), help="where to build"
    )
    options = parser.parse_args()
    libraries = options.libraries.resolve()
    build(libraries)
    print("| | launches | host waits | GB moved | peak |\n| --- | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        for contender in CONTENDERS:
            print(row(contender, options.recipe, libraries, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
