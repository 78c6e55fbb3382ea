"""`fastllama` on the null device: python -m benchmarks.rehearsal.command ARGUMENTS.

With FAILING_RANK in the environment, this rank fails in its second update.
"""

import os
import sys

from torch import Tensor

import fastllama.train as trainer
from benchmarks.rehearsal.cudnn import replace_operators
from fastllama.checkpoints.state import TrainState
from fastllama.cli import main
from fastllama.data.loader import BatchLoader
from fastllama.training.session import Session
from fastllama.training.stopping import StopSignal


def fail_in_second_update() -> None:
    """Let the second update of this process raise an error."""
    train_step = trainer.train_step

    def failing(
        session: Session, state: TrainState, loader: BatchLoader, stop: StopSignal
    ) -> Tensor:
        if state.progress.step == 1:
            raise RuntimeError("a failure on purpose")
        return train_step(session, state, loader, stop)

    trainer.train_step = failing


if __name__ == "__main__":
    replace_operators()
    if os.environ.get("FAILING_RANK") == os.environ.get("RANK", "0"):
        fail_in_second_update()
    main(sys.argv[1:])
