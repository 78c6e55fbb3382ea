"""Turns the scalars of each update into rows, a progress bar, and the decision to stop."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from fastllama.checkpoints.state import TrainProgress
from fastllama.config import Config
from fastllama.data.dataset import Dataset
from fastllama.distributed.world import World
from fastllama.errors import TrainingFailedError
from fastllama.logs.clocks import Clock, DeviceClock, LateScalars
from fastllama.logs.rows import Row
from fastllama.logs.sinks import MetricsLog, append, finite, outlived
from fastllama.optim.adamw import REFUSALS
from fastllama.optim.schedule import learning_rate
from fastllama.planning.flops import flops_per_token, peak_flops
from fastllama.run_folder import RunFolder
from fastllama.training.skipped_steps import RefusedSeries, batch_of, batch_positions


class Recorder:
    """Reads the scalars of an update while the next one runs; only the main process writes.

    Every process counts refused updates and sees the same decision to stop, because the scalars
    were averaged over all of them.
    """

    def __init__(
        self,
        config: Config,
        run: RunFolder,
        dataset: Dataset,
        progress: TrainProgress,
        world: World,
        console: Console,
    ) -> None:
        """Open the logs of `run` where `progress` left them."""
        self.stop = False
        self.refused_series: RefusedSeries | None = None
        """Updates refused in a row, once they are `training.rewind_after`."""
        self.clock = DeviceClock() if world.device.type == "cuda" else Clock()
        self._config, self._progress, self._world = config, progress, world
        self._console, self._run, self._dataset = console, run, dataset
        self._log = self._open_log()
        self._scalars = LateScalars()
        # Updates of this session, those after a rewind that are done again counted again.
        self._n_done = 0
        self._pending_step: int | None = None
        # Where the data of the pending update ends.
        self._pending_end = 0
        self._pending: Row | None = None
        # When the pending update was known to be done, and what stood at the last logged one.
        self._stamp, self._stamp_wait = 0.0, 0.0
        self._last_tokens, self._last_training, self._last_wait = 0, 0.0, 0.0
        self._wait_seconds = 0.0
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("updates"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=config.n_updates, completed=progress.step)

    def push(self, values: Tensor, wait_seconds: float) -> None:
        """Take (loss, grad_norm, refused, stop) of the update just launched, on the device.

        Raises:
            TrainingFailedError: too many updates in a row were refused.
        """
        self.flush()
        self.clock.launched()
        self._scalars.send(values)
        self._wait_seconds = wait_seconds
        self._pending_step, self._pending_end = self._progress.step, self._progress.position
        if self._world.device.type == "cpu":
            self._receive()

    def rewind(self) -> None:
        """Go on where `progress` was taken back to; what counts the session counts on."""
        self.refused_series = None
        # Whoever was asked to stop says so in the next update again.
        self.stop = False
        self._log = self._open_log()
        # The next loader counts its waits from 0.
        self._stamp_wait = self._last_wait = 0.0
        self._bar.reset(self._task, completed=self._progress.step)

    @contextmanager
    def side_job(self) -> Iterator[None]:
        """Keep what happens inside out of the training time."""
        self._receive()
        with self.clock.side_job():
            yield

    def add_validation(self, loss: float, bits_per_byte: float) -> None:
        """Attach a validation to the update it follows, within `side_job`."""
        assert self._pending is not None
        self._pending.val_loss, self._pending.val_bits_per_byte = loss, bits_per_byte

    def flush(self) -> None:
        """Write the row of the last update, if it is one to log."""
        self._receive()
        row, self._pending = self._pending, None
        if row is None:
            return
        self._bar.update(self._task, completed=row.step)
        due = row.step % self._config.logging.log_interval == 0 or row.val_loss is not None
        if not (due or row.step in (1, self._config.n_updates)):
            return
        self._last_tokens, self._last_training = row.tokens, self._stamp
        self._last_wait = self._stamp_wait
        row.peak_gib = self._peak_gib()
        if self._log is not None:
            with outlived(self._console, f"The row of update {row.step}"):
                self._log.write(row)
        self._console.print(row.line())

    def sync(self) -> None:
        """Write the row of the last update and make all rows durable."""
        self.flush()
        if self._log is not None:
            with outlived(self._console, "The rows so far"):
                self._log.sync()

    def _open_log(self) -> MetricsLog | None:
        if not self._world.is_main:
            return None
        return MetricsLog(self._run.path, self._progress.step, self._config.logging.tensorboard)

    def _receive(self) -> None:
        if self._pending_step is None:
            return
        loss, grad_norm, refused, stop = self._scalars.receive()
        step, self._pending_step = self._pending_step, None
        self._n_done += 1
        self._stamp, self._stamp_wait = self.clock.training(), self._wait_seconds
        self.stop = self.stop or stop > 0
        self._pending = self._row(step, loss, grad_norm)
        self._count_refused(step, loss, grad_norm, REFUSALS[round(refused)])
        self._pending.skipped_steps = self._progress.skipped_steps

    def _row(self, step: int, loss: float, grad_norm: float) -> Row:
        per_update = self._config.training.tokens_per_update
        tokens = self._n_done * per_update
        wall = self.clock.wall()
        tok_per_s = (tokens - self._last_tokens) / (self._stamp - self._last_training)
        mfu_causal, mfu_palm = self._mfu(tok_per_s)
        return Row(
            step=step,
            tokens=tokens,
            tokens_total=step * per_update,
            loss=loss,
            perplexity=math.exp(loss) if loss < 700 else math.inf,
            lr=learning_rate(step, self._config),
            grad_norm=grad_norm,
            tok_per_s=tok_per_s,
            time_s=wall,
            data_wait_s=self._stamp_wait - self._last_wait,
            skipped_steps=0,
            progress=step / self._config.n_updates,
            eta_s=(self._config.n_updates - step) * wall / self._n_done,
            mfu_causal=mfu_causal,
            mfu_palm=mfu_palm,
        )

    def _mfu(self, tok_per_s: float) -> tuple[float | None, float | None]:
        if self._world.device.type != "cuda":
            return None, None
        peak = peak_flops(torch.cuda.get_device_name(self._world.device))
        if peak is None:
            return None, None
        per_flop = tok_per_s / (peak * self._world.size)
        model = self._config.model
        return (
            flops_per_token(model, causal=True) * per_flop,
            flops_per_token(model, causal=False) * per_flop,
        )

    def _peak_gib(self) -> float | None:
        if self._world.device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self._world.device) / 2**30

    def _count_refused(self, step: int, loss: float, grad_norm: float, reason: str) -> None:
        progress, limit = self._progress, self._config.training.max_bad_updates
        if not reason:
            progress.skipped_in_a_row = 0
            return
        progress.skipped_steps += 1
        progress.skipped_in_a_row += 1
        first, last = batch_positions(self._pending_end, self._config)
        batch = f"positions {first} to {last} of the data order"
        self._console.print(
            f"step {step}: {reason} (loss {loss:.4g}, gnorm {grad_norm:.4g}); the update was "
            f"skipped ({batch})"
        )
        if self._world.is_main:
            self._keep_batch(step, loss, grad_norm, reason)
        rewind_after = self._config.training.rewind_after
        if rewind_after and progress.skipped_in_a_row >= rewind_after:
            self.refused_series = self.refused_series or RefusedSeries(
                step - progress.skipped_in_a_row + 1, step, self._pending_end
            )
        elif progress.skipped_in_a_row >= limit:
            raise TrainingFailedError(
                f"The last {limit} updates were all refused, the last of them, at {batch}, because "
                f"{reason}; the weights are those of update {step - limit}. Resume from the last "
                f"checkpoint with a lower optimizer.max_lr, or look at the data in "
                f"{self._run.bad_updates}."
            )

    def _keep_batch(self, step: int, loss: float, grad_norm: float, reason: str) -> None:
        with outlived(self._console, f"The batch of update {step}"):
            record = {
                "step": step,
                "loss": finite(loss),
                "grad_norm": finite(grad_norm),
                "reason": reason,
                **batch_of(self._pending_end, self._config, self._dataset),
            }
            append(self._run.bad_updates, json.dumps(record) + "\n")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.flush()
        self._bar.stop()
        if self._log is not None:
            with outlived(self._console, "The last TensorBoard events"):
                self._log.close()
