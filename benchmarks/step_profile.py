"""Profile of a training step: device time per class of kernels, next to the bound of each class.

The name of a kernel determines its class: the first matching pattern below counts. A kernel that
matches no pattern is `other`; the table is only meaningful while `other` is small. Idle is the wall
time during which no kernel ran.
"""

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.results import ProfileShare
from benchmarks.timing import synchronize
from fastllama.planning.bound import Bound

# Patterns for names of CUDA kernels, and for PyTorch's operators in a rehearsal.
CLASSES = {
    "rms_norm": r"rms_norm",
    "rope": r"rope",
    "swiglu": r"swiglu|silu",
    "cross_entropy": r"cross_entropy|_scale_kernel|log_softmax|nll_loss",
    "attention": r"flash|fmha|sdpa|scaled_dot_product|attention|cudnn",
    "matmul": r"gemm|nvjet|cutlass|xmma|cublas|splitKreduce|aten::(mm|addmm|bmm|matmul)",
    # The backward sorts the token ids, to sum the gradients of equal ids.
    "embedding": r"embedding|index_?select|index_put|gather_kernel|RadixSort|grad_weight|segment",
    "optimizer": r"adam|multi_tensor|foreach|norm_kernel|linalg_vector_norm",
    "copy": r"memcpy|memset|copy_|CatArray|chunk_cat|FillFunctor|aten::(copy|cat|fill|zero)",
    "communication": r"nccl|all_?gather|reduce_?scatter|all_?reduce",
    # Reductions over the programs of a kernel, gradient accumulation, and Inductor's kernels.
    "elementwise": r"triton_(poi|red|per)|elementwise_kernel|reduce_kernel",
}
N_LISTED = 60
"""Number of kernels in the listing."""


@dataclass(frozen=True)
class Launch:
    """One executed kernel."""

    name: str
    start_s: float
    end_s: float


def profile_updates(
    update: Callable[[], object], n_updates: int, device: torch.device
) -> tuple[list[Launch], float]:
    """Profile `n_updates` updates of a run; return their kernels, and their wall seconds together.

    One more is profiled before them and left out: it starts with an empty queue, in which the
    device waits for the host. On a GPU only kernels are recorded. Recording host events would slow
    the host down and make the device wait.
    """
    on_cuda = device.type == "cuda"
    update()
    synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as found:
        for _ in range(n_updates + 1):
            update()
        synchronize(device)
    kind = DeviceType.CUDA if on_cuda else DeviceType.CPU
    launches = []
    for event in found.events():
        # A user annotation spans kernels that are already counted.
        if event.device_type == kind and not event.is_user_annotation:
            start = event.time_range.start
            # CPU operators nest, so count only the time of the operator itself.
            end = event.time_range.end if on_cuda else start + event.self_cpu_time_total
            launches.append(Launch(event.name, start / 1e6, end / 1e6))
    return without_first(launches, n_updates + 1)


def without_first(launches: Sequence[Launch], n_updates: int) -> tuple[list[Launch], float]:
    """Launches of all updates but the first, and the seconds from its end to theirs.

    All updates launch the same kernels.
    """
    in_order = sorted(launches, key=lambda launch: launch.start_s)
    n_first = len(in_order) // n_updates
    first, others = in_order[:n_first], in_order[n_first:]
    return others, max(one.end_s for one in others) - max(one.end_s for one in first)


def listing(launches: Sequence[Launch], n_updates: int) -> str:
    """Text table of the longest kernels with their class, to inspect the shares and `other`."""
    seconds: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for launch in launches:
        seconds[launch.name] += launch.end_s - launch.start_s
        calls[launch.name] += 1
    lines = [f"{'ms per update':>13}  {'calls':>6}  class          kernel"]
    for name in sorted(seconds, key=lambda name: -seconds[name])[:N_LISTED]:
        each, count = 1e3 * seconds[name] / n_updates, calls[name] / n_updates
        lines.append(f"{each:13.3f}  {count:6.0f}  {operator_class(name):13}  {name}")
    return "\n".join(lines) + "\n"


def write_launches(file: Path, launches: Sequence[Launch]) -> None:
    """Write all launches in order: name, start and duration in microseconds, as gzipped JSON."""
    rows = [
        (
            launch.name,
            round(1e6 * launch.start_s, 2),
            round(1e6 * (launch.end_s - launch.start_s), 2),
        )
        for launch in sorted(launches, key=lambda launch: launch.start_s)
    ]
    with gzip.open(file, "wt") as stream:
        json.dump(rows, stream)


def operator_class(name: str) -> str:
    """Class of a kernel, from its name."""
    for known, pattern in CLASSES.items():
        if re.search(pattern, name, re.IGNORECASE):
            return known
    return "other"


def profile_shares(
    recipe: str,
    launches: Sequence[Launch],
    wall_s: float,
    n_updates: int,
    bound: Bound | None,
    tokens_per_update: int,
) -> list[ProfileShare]:
    """One record per class, the longest first, including `idle`."""
    seconds: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for launch in launches:
        name = operator_class(launch.name)
        seconds[name] += launch.end_s - launch.start_s
        calls[name] += 1
    seconds["idle"] = wall_s - busy_seconds(launches)
    allowed = {} if bound is None else bound_by_class(bound, tokens_per_update)
    return [
        ProfileShare(
            recipe=recipe,
            operator_class=name,
            seconds=seconds[name] / n_updates,
            share=seconds[name] / wall_s,
            calls=calls[name] // n_updates,
            bound_s=allowed.get(name),
        )
        for name in sorted(seconds, key=lambda name: -seconds[name])
    ]


def busy_seconds(launches: Iterable[Launch]) -> float:
    """Time during which at least one kernel ran."""
    busy, until = 0.0, -1.0
    for launch in sorted(launches, key=lambda launch: launch.start_s):
        busy += max(0.0, launch.end_s - max(launch.start_s, until))
        until = max(until, launch.end_s)
    return busy


def bound_by_class(bound: Bound, tokens_per_update: int) -> dict[str, float]:
    """Seconds per update of each class in the bound."""
    per_token = {
        "matmul": bound.matmul,
        "attention": bound.attention_forward + bound.attention_backward,
        "optimizer": bound.optimizer,
        **bound.memory,
    }
    return {name: seconds * tokens_per_update for name, seconds in per_token.items()}
