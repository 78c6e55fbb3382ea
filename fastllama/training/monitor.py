"""Reads the result of each update, one update late, and acts on it."""

import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from torch import Tensor

from fastllama.checkpoints.state import TrainProgress
from fastllama.logs.clocks import Clock, DeviceClock
from fastllama.logs.recorder import Recorder
from fastllama.logs.results import LateScalars, SourceResult, UpdateResult
from fastllama.optim.clipping import SKIP_REASONS
from fastllama.training.session import Session
from fastllama.training.skipped_steps import SkippedSteps


class UpdateMonitor:
    """Passes the result of each update to the recorder and to `SkippedSteps`.

    Every rank has a monitor. All decide the same, because the scalars are averaged over the ranks.
    """

    def __init__(self, session: Session, progress: TrainProgress) -> None:
        """Start after `progress`, which the training loop advances."""
        on_cuda = session.world.device.type == "cuda"
        self.clock = DeviceClock() if on_cuda else Clock()
        self.skipped = SkippedSteps(session, progress)
        self.recorder = Recorder(
            session.config, session.world, session.run.path, session.console, progress.step
        )
        self.stop = False
        """Whether any rank was asked to stop."""
        self._progress = progress
        self._session = session
        self._reads_at_once = not on_cuda
        self._scalars = LateScalars()
        self._sent: tuple[int, int, float] | None = None
        self._is_warm = False

    @property
    def wants_to_pause(self) -> bool:
        """Whether the loop must end before the last update: to stop, or to rewind."""
        return self.stop or self.skipped.series is not None

    def push(self, values: Tensor, data_wait_seconds: float) -> None:
        """Take the result of the update just launched, as `train_step` returns it.

        `data_wait_seconds` is how long the update waited for data.

        Raises:
            TrainingFailedError: too many updates in a row were skipped.
        """
        self.flush()
        self.clock.launched()
        self._scalars.send(values)
        self._sent = self._progress.step, self._progress.position, data_wait_seconds
        if self._reads_at_once:
            self._receive()
        if not self._is_warm:
            # The first update has compiled the model.
            _freeze_garbage()
            self._is_warm = True

    def flush(self) -> None:
        """Read the result of the last update, and write its row."""
        self._receive()
        self.recorder.flush()

    @contextmanager
    def side_job(self) -> Iterator[None]:
        """Exclude the time inside from the training seconds."""
        self._receive()
        with self.clock.side_job():
            yield
            _freeze_garbage()

    def restart(self) -> None:
        """Continue from `progress`, which a rewind has moved back."""
        self.skipped.series = None
        # A pending stop request is re-sent with the next update.
        self.stop = False
        self.recorder.restart(self._progress.step)

    def _receive(self) -> None:
        if self._sent is None:
            return
        loss, grad_norm, skip_reason, stop, *others = self._scalars.receive()
        world_size = self._session.world.size
        (step, end_position, data_wait_seconds), self._sent = self._sent, None
        result = UpdateResult(
            step=step,
            end_position=end_position,
            loss=loss,
            grad_norm=grad_norm,
            skip_reason=SKIP_REASONS[round(skip_reason)],
            stop=stop > 0,
            training_seconds=self.clock.training(),
            data_wait_seconds=data_wait_seconds,
            collective_seconds=others[:world_size],
            sources=self._source_results(
                [world_size * mean for mean in others[world_size:]], step, end_position
            ),
        )
        wall_seconds = self.clock.wall()
        self.stop = self.stop or result.stop
        self.skipped.observe(result)
        self.recorder.record(result, wall_seconds, self._progress.skipped_steps)

    def _source_results(
        self, loss_sums: list[float], step: int, end_position: int
    ) -> list[SourceResult]:
        """The part of each source in update `step`, from the sums over its sequences."""
        if not loss_sums:
            return []
        config, train = self._session.config, self._session.dataset.train
        before = train.counts(end_position - config.positions_per_update)
        after = train.counts(end_position)
        results = []
        for loss_sum, blocks, total in zip(
            loss_sums, (after - before).tolist(), after.tolist(), strict=True
        ):
            tokens = blocks * train.block_len
            n_sequences = tokens // config.at(step).model.max_seq_len
            loss = loss_sum / n_sequences if n_sequences else math.nan
            results.append(SourceResult(loss, tokens, total * train.block_len))
        return results

    def __enter__(self) -> Self:
        self.recorder.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        gc.unfreeze()
        if error is None:
            self.flush()
        self.recorder.close()


def _freeze_garbage() -> None:
    """Collect garbage, and exempt what is left from later collections.

    A full collection over the objects of PyTorch takes a fifth of a second on a CPU core. It would
    stop one rank in the middle of an update, and all others would wait. An update itself leaves no
    reference cycles.
    """
    gc.collect()
    gc.freeze()
