"""The contenders: one training function each, all on the same workload.

Each contender trains in a process of its own, so that none inherits compiled code or memory from
another.

Every contender keeps weights and moments in float32 and computes in `training.dtype`. fastllama and
torchtitan use FSDP2's mixed precision. The others use autocast, as PyTorch and Hugging Face scripts
do. All except the tutorial read from fastllama's loader, which helps them.
"""

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from benchmarks.conditions import default_device
from benchmarks.training.job import Budget, Job, Outcome, Spec, Trained
from benchmarks.training.peers import train_huggingface, train_torchtitan
from benchmarks.training.plain import train_reference, train_tutorial
from benchmarks.training.trainer import train_fastllama
from fastllama.atomic import write_atomic
from fastllama.config import config_from_dict


@dataclass(frozen=True)
class Contender:
    """A training function and its requirements."""

    train: Callable[[Job], Trained]
    packages: dict[str, str] = field(default_factory=dict)
    """PyPI name of each required module."""
    needs_gpu: bool = False
    compiles: bool = False
    """Always compiles the whole model, whatever `training.compile` says."""


_TRANSFORMERS = {"transformers": "transformers"}
CONTENDERS = {
    "reference-eager": Contender(lambda job: train_reference(job, compiled=False)),
    "reference-compiled": Contender(lambda job: train_reference(job, compiled=True), compiles=True),
    "fastllama": Contender(train_fastllama),
    "huggingface": Contender(train_huggingface, _TRANSFORMERS),
    "huggingface-compiled": Contender(
        lambda job: train_huggingface(job, compiled=True), _TRANSFORMERS, compiles=True
    ),
    "huggingface-liger": Contender(
        lambda job: train_huggingface(job, liger=True),
        _TRANSFORMERS | {"liger_kernel": "liger-kernel"},
        needs_gpu=True,
    ),
    "torchtitan": Contender(train_torchtitan, {"torchtitan": "torchtitan"}),
    "tutorial": Contender(train_tutorial, compiles=True),
}
"""In the order they run. The plain models come first: they are the baseline for the losses."""


def run(spec: Spec) -> Outcome:
    """Train in this process. An exception of the contender becomes the outcome's `failure`."""
    config = config_from_dict(spec.config, source="the specification")
    with ExitStack() as stack:
        budget = Budget(spec, stack)
        job = Job(config, default_device(), budget, spec.plain_operators)
        try:
            trained = CONTENDERS[spec.contender].train(job)
        except Exception as error:  # Raised by a third-party library; reported in the row.
            lines = f"{type(error).__name__}: {error}".strip().splitlines()
            return Outcome(failure=lines[0], is_out_of_memory=is_out_of_memory(error))
    on_cuda = job.device.type == "cuda"
    return Outcome(
        losses=trained.losses,
        update_seconds=trained.seconds[spec.warm_ups :],
        seconds_to_first_update=budget.seconds_to_first_update,
        peak_bytes=torch.cuda.max_memory_allocated() if on_cuda else None,
        sm_clock_mhz=budget.monitor.sm_clock_mhz,
        power_watts=budget.monitor.power_watts,
        details=trained.details,
    )


def is_out_of_memory(error: Exception) -> bool:
    """Whether a smaller batch may help. Not every CUDA library raises `torch.OutOfMemoryError`."""
    markers = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in markers)


def write_outcome(spec: Spec, path: Path) -> None:
    """Train in this process, and write the outcome as JSON."""
    write_atomic(path, json.dumps(asdict(run(spec))))
