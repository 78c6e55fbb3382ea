"""Who trains, and how: one function a contender, all over the same workload.

    python -m benchmarks.training.contenders SPEC.json OUTCOME.json

trains one contender in this process, which is how the benchmarks call it, so that nothing compiled,
allocated or imported by one contender is there for the next.

Every contender keeps weights and moments in float32 and computes in `training.dtype`: the plain
ones under autocast, which is how a PyTorch or Hugging Face script does it, fastllama and torchtitan
by FSDP2's mixed precision. All but the tutorial are fed by fastllama's loader, to their advantage.
"""

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from benchmarks.conditions import default_device
from benchmarks.training.job import Job, Outcome, Pace, Spec, Trained
from benchmarks.training.peers import train_huggingface, train_torchtitan
from benchmarks.training.plain import train_reference, train_tutorial
from benchmarks.training.trainer import train_fastllama
from fastllama.atomic import write_atomic
from fastllama.config import config_from_dict


@dataclass(frozen=True)
class Contender:
    """A way to train, and what it takes."""

    train: Callable[[Job], Trained]
    packages: dict[str, str] = field(default_factory=dict)
    """What pip calls each module that has to be there."""
    needs_gpu: bool = False
    compiles: bool = False
    """Whatever `training.compile` says."""


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
"""In the order they run: first those whose losses the others are held to."""


def run(spec: Spec) -> Outcome:
    """Train in this process; what the contender raises is told in the outcome."""
    config = config_from_dict(spec.config, source="the specification")
    with ExitStack() as held:
        pace = Pace(spec, held)
        job = Job(config, default_device(), pace, spec.plain_operators)
        try:
            trained = CONTENDERS[spec.contender].train(job)
        except Exception as error:  # Libraries of others; a row of results says what they raise.
            lines = f"{type(error).__name__}: {error}".strip().splitlines()
            return Outcome(failure=lines[0], is_out_of_memory=is_out_of_memory(error))
    on_cuda = job.device.type == "cuda"
    return Outcome(
        losses=trained.losses,
        update_seconds=trained.seconds[spec.warm_ups :],
        seconds_to_first_update=pace.seconds_to_first_update,
        peak_bytes=torch.cuda.max_memory_allocated() if on_cuda else None,
        sm_clock_mhz=pace.monitor.sm_clock_mhz,
        power_watts=pace.monitor.power_watts,
        details=trained.details,
    )


def is_out_of_memory(error: Exception) -> bool:
    """Whether a smaller batch may help; libraries on CUDA do not all raise PyTorch's own error."""
    told = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in told)


def main() -> None:
    specification, outcome = map(Path, sys.argv[1:])
    spec = Spec(**json.loads(specification.read_text()))
    write_atomic(outcome, json.dumps(asdict(run(spec))))


if __name__ == "__main__":
    main()
