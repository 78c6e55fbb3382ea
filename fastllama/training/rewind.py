"""Going back behind updates that were refused in a row, and on with the data after them.

PaLM (Chowdhery et al. 2022, section 5.1) did so by hand: from a checkpoint before a spike of the
loss, without the batches up to its end, which were not bad by themselves but only to that state of
the weights. Where the run goes on is a function of the data and the options alone, so one that is
killed and resumed takes the same way.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from fastllama.checkpoints.folder import complete_checkpoints, point_latest, set_aside, step_of
from fastllama.checkpoints.reading import load_tensors, newest_checkpoint, read_progress
from fastllama.checkpoints.state import TrainState
from fastllama.checkpoints.writing import CheckpointWriter
from fastllama.distributed.world import World
from fastllama.errors import TrainingFailedError
from fastllama.training.skipped_steps import RefusedSeries

MOST_RETURNS = 3
"""To one checkpoint: if other data does not help, its weights are at fault."""


@dataclass
class Rewinder:
    """Takes a run back; every process has one and calls it alike."""

    state: TrainState
    writer: CheckpointWriter
    folder: Path
    """Of the run's checkpoints."""
    identity: dict[str, Any]
    world: World
    console: Console
    n_returns: int = 0
    """To the checkpoint `last`."""
    last: Path | None = None

    def go_back(self, refused: RefusedSeries) -> None:
        """Restore the newest checkpoint before `refused`, and move past the data of its updates.

        Checkpoints that were saved during the series are kept aside.

        Raises:
            TrainingFailedError: there is no such checkpoint, or it was gone back to before.
        """
        self.writer.wait()
        self.world.from_main(lambda: self._set_aside_from(refused.first_step))
        checkpoint, _ = newest_checkpoint(self.folder, self.identity)
        what = f"updates {refused.first_step} to {refused.last_step} were refused in a row"
        if checkpoint is None:
            raise TrainingFailedError(
                f"{what}, and there is no checkpoint before them to go back to; save more often by "
                "checkpoint.interval_tokens, or lower optimizer.max_lr."
            )
        self.n_returns = self.n_returns + 1 if checkpoint == self.last else 1
        self.last = checkpoint
        if self.n_returns > MOST_RETURNS:
            raise TrainingFailedError(
                f"{what}, after {MOST_RETURNS} returns to {checkpoint}, each to other data; lower "
                "optimizer.max_lr, or resume from an older checkpoint by moving that one away."
            )
        saved = self.world.from_main(lambda: read_progress(checkpoint))
        load_tensors(checkpoint, self.state.tensors())
        if self.state.spikes is not None:
            self.state.spikes.restore(saved.spikes)
        progress = self.state.progress
        progress.step, progress.position = saved.step, refused.next_position
        progress.spikes, progress.skipped_in_a_row = saved.spikes, 0
        self.world.from_main(lambda: point_latest(checkpoint))
        self.console.print(
            f"{what}: back to {checkpoint}, and on with position {refused.next_position} of the "
            "data order"
        )

    def _set_aside_from(self, step: int) -> None:
        for path in complete_checkpoints(self.folder):
            if step_of(path) >= step:
                set_aside(path)
