"""Updates of a peer on the null device, in a process of its own.

    python -m benchmarks.rehearsal.peer CONTENDER RECIPE MICRO_BATCHES FOLDER

CONTENDER is one of benchmarks/training/contenders.py. Writes into FOLDER, for the last of four
updates on one device: update.log, its calls; peak, the bytes that it had allocated at most; and
inductor, the bytes of Inductor's kernels.
"""

import ctypes
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch._inductor import config as inductor
from torch._inductor.runtime.triton_heuristics import CachingAutotuner

from benchmarks.rehearsal.case import Case
from benchmarks.rehearsal.cudnn import replace_operators
from benchmarks.training.contenders import CONTENDERS
from benchmarks.training.job import Budget, Job
from benchmarks.training.workload import with_synthetic_data

N_UPDATES = 4
BATCH_SIZE = 4
"""Sequences of a micro-batch. The recipe's 16 do not fit the device with every peer."""


class InductorBytes:
    """Sums the bytes of Inductor's kernels, as Inductor estimates them."""

    def __init__(self) -> None:
        """Begin to count, in this process."""
        self.total = 0.0
        # Otherwise a kernel does not have its estimate.
        inductor.benchmark_kernel = True
        run = CachingAutotuner.run

        def counted(kernel: Any, *arguments: Any, **options: Any) -> Any:
            self.total += kernel.inductor_meta["kernel_num_gb"] * 1e9
            return run(kernel, *arguments, **options)

        CachingAutotuner.run = counted  # type: ignore[method-assign, assignment]


class LoggingBudget(Budget):
    """Logs the last update, and then ends the process.

    A request to stop goes over the device, which returns zeros.
    """

    def __init__(self, folder: Path) -> None:
        """Write into `folder`."""
        self._folder, self._done = folder, 0
        self._inductor = InductorBytes()
        self._runtime = ctypes.CDLL(None)

    def is_spent(self) -> bool:
        """Count one update; the last one does not return."""
        self._done += 1
        if self._done == N_UPDATES - 1:
            torch.cuda.reset_peak_memory_stats()
            self._inductor.total = 0.0
            self._runtime.null_log_to(str(self._folder / "update.log").encode())
        if self._done == N_UPDATES:
            self._runtime.null_log_to(None)
            (self._folder / "peak").write_text(str(torch.cuda.max_memory_allocated()))
            (self._folder / "inductor").write_text(str(self._inductor.total))
            os._exit(0)
        return False


def main(contender: str, recipe: str, micro_batches: int, folder: Path) -> None:
    replace_operators()
    config = Case(recipe, 1, compiled=True, options={"training.batch_size": BATCH_SIZE}).config()
    tokens = micro_batches * BATCH_SIZE * config.model.max_seq_len
    training = dataclasses.replace(config.training, tokens_per_update=tokens)
    config = dataclasses.replace(config, training=training)
    config = with_synthetic_data(config, folder / "data")
    CONTENDERS[contender].train(Job(config, torch.device("cuda", 0), LoggingBudget(folder), []))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
