"""Updates of a peer on the null device, in a process of its own.

    python -m benchmarks.rehearsal.peer CONTENDER RECIPE MICRO_BATCHES FOLDER

CONTENDER is one of benchmarks/training/contenders.py. Writes FOLDER/update.log, the calls of the
last of four updates on one device, and FOLDER/peak, the bytes that it had allocated at most.
"""

import ctypes
import dataclasses
import os
import sys
from pathlib import Path

import torch

from benchmarks.rehearsal.case import Case
from benchmarks.rehearsal.cudnn import replace_operators
from benchmarks.training.contenders import CONTENDERS
from benchmarks.training.job import Budget, Job
from benchmarks.training.workload import with_synthetic_data

N_UPDATES = 4
BATCH_SIZE = 4
"""Sequences of a micro-batch. The recipe's 16 do not fit the device with every peer."""


class LoggingBudget(Budget):
    """Logs the last update, and then ends the process.

    A request to stop goes over the device, which returns zeros.
    """

    def __init__(self, folder: Path) -> None:
        """Write into `folder`."""
        self._folder, self._done = folder, 0
        self._runtime = ctypes.CDLL(None)

    def is_spent(self) -> bool:
        """Count one update; the last one does not return."""
        self._done += 1
        if self._done == N_UPDATES - 1:
            torch.cuda.reset_peak_memory_stats()
            self._runtime.null_log_to(str(self._folder / "update.log").encode())
        if self._done == N_UPDATES:
            self._runtime.null_log_to(None)
            (self._folder / "peak").write_text(str(torch.cuda.max_memory_allocated()))
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
