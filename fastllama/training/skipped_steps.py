"""Skipped updates: counting them, recording their batches, stopping the run or rewinding it.

`fastllama.optim.clipping.update` decides on the device whether an update is skipped. This file
decides on the host what follows.

PaLM (Chowdhery et al. 2022, section 5.1) rewound by hand: it restarted from a checkpoint before a
loss spike and skipped the batches up to the spike's end. The batches were not bad by themselves,
only together with that state of the weights. A rewind depends on the data and the options alone, so
a run that is killed and resumed rewinds in the same way.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from fastllama.checkpoints.folder import (
    complete_checkpoints,
    point_latest,
    set_aside,
    step_of,
)
from fastllama.checkpoints.reading import load_state, newest_checkpoint, read_progress
from fastllama.checkpoints.state import TrainProgress, TrainState
from fastllama.checkpoints.writing import CheckpointWriter
from fastllama.errors import TrainingFailedError
from fastllama.logs.log_file import append
from fastllama.logs.results import UpdateResult
from fastllama.logs.rows import finite
from fastllama.logs.sinks import report_write_errors
from fastllama.training.batches import batch_positions, batch_record
from fastllama.training.session import Session

MAX_REWINDS = 3
"""Rewinds to one checkpoint. If other data does not help, the weights in it are at fault."""


@dataclass(frozen=True)
class SkippedSeries:
    """Skipped updates in a row."""

    first_step: int
    last_step: int
    next_position: int
    """Position in the data order after the last skipped update."""


class SkippedSteps:
    """Counts skipped updates in the run's progress, reports them, and records their batches."""

    def __init__(self, session: Session, progress: TrainProgress) -> None:
        self.series: SkippedSeries | None = None
        """Skipped updates in a row, once there are `training.rewind_after` of them."""
        self._session, self._progress = session, progress

    def observe(self, result: UpdateResult) -> None:
        """Act on the result of one update.

        Raises:
            TrainingFailedError: `training.max_bad_updates` in a row were skipped.
        """
        progress, training = self._progress, self._session.config.training
        if not result.skip_reason:
            progress.skipped_in_a_row = 0
            return
        progress.skipped_steps += 1
        progress.skipped_in_a_row += 1
        first, last = batch_positions(result.end_position, self._session.config)
        batch = f"positions {first} to {last} of the data order"
        self._session.console.print(
            f"step {result.step}: {result.skip_reason} (loss {result.loss:.4g}, "
            f"gnorm {result.grad_norm:.4g}); the update was skipped ({batch})"
        )
        if self._session.world.is_main:
            self._record_batch(result)
        n_in_a_row = progress.skipped_in_a_row
        if training.rewind_after and n_in_a_row >= training.rewind_after:
            self.series = self.series or SkippedSeries(
                result.step - n_in_a_row + 1, result.step, result.end_position
            )
        elif n_in_a_row >= training.max_bad_updates:
            limit = training.max_bad_updates
            raise TrainingFailedError(
                f"The last {limit} updates were all skipped. The last of them, at {batch}, was "
                f"skipped because {result.skip_reason}. The weights are those of update "
                f"{result.step - limit}. Resume from the last checkpoint with a lower "
                f"optimizer.max_lr, or look at the data in {self._session.run.bad_updates}."
            )

    def _record_batch(self, result: UpdateResult) -> None:
        session = self._session
        with report_write_errors(session.console, f"The batch of update {result.step}"):
            record = {
                "step": result.step,
                "loss": finite(result.loss),
                "grad_norm": finite(result.grad_norm),
                "reason": result.skip_reason,
                **batch_record(result.step, result.end_position, session.config, session.dataset),
            }
            append(session.run.bad_updates, json.dumps(record) + "\n")


@dataclass
class Rewinder:
    """Rewinds a run to an earlier checkpoint. Every rank has one; all call it together."""

    session: Session
    state: TrainState
    writer: CheckpointWriter
    n_rewinds: int = 0
    """Rewinds to the checkpoint `last` so far."""
    last: Path | None = None

    def rewind(self, skipped: SkippedSeries) -> None:
        """Load the newest checkpoint before `skipped`, and move past the data of the series.

        Checkpoints saved during the series are set aside.

        Raises:
            TrainingFailedError: there is no earlier checkpoint, or rewinding to it did not help.
        """
        world, folder = self.session.world, self.session.run.checkpoints
        self.writer.wait()
        world.from_main(lambda: set_aside_from(folder, skipped.first_step))
        checkpoint, _ = newest_checkpoint(folder, self.session.identity)
        what = f"updates {skipped.first_step} to {skipped.last_step} were skipped in a row"
        if checkpoint is None:
            raise TrainingFailedError(
                f"{what}, and there is no checkpoint before them to rewind to; save more often by "
                "checkpoint.interval_tokens, or lower optimizer.max_lr."
            )
        self.n_rewinds = self.n_rewinds + 1 if checkpoint == self.last else 1
        self.last = checkpoint
        if self.n_rewinds > MAX_REWINDS:
            raise TrainingFailedError(
                f"{what}, after {MAX_REWINDS} rewinds to {checkpoint}, each to other data; lower "
                "optimizer.max_lr, or move this checkpoint away to resume from an older one."
            )
        saved = world.from_main(lambda: read_progress(checkpoint))
        load_state(checkpoint, self.state)
        if self.state.spikes is not None:
            self.state.spikes.restore(saved.spikes)
        progress = self.state.progress
        progress.step, progress.position = saved.step, skipped.next_position
        progress.spikes, progress.skipped_in_a_row = saved.spikes, 0
        world.from_main(lambda: point_latest(checkpoint))
        self.session.console.print(
            f"{what}: rewound to {checkpoint}, resuming at position {skipped.next_position} of "
            "the data order"
        )


def set_aside_from(folder: Path, step: int) -> None:
    """Set aside the checkpoints of update `step` and later."""
    for path in complete_checkpoints(folder):
        if step_of(path) >= step:
            set_aside(path)
