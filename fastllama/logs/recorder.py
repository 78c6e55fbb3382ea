"""Turns the results of updates into rows."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastllama.config import Config
from fastllama.distributed.world import World
from fastllama.logs.results import UpdateResult
from fastllama.logs.rows import Row, named_columns
from fastllama.logs.sinks import MetricsLog
from fastllama.logs.slow_rank import SlowRank
from fastllama.optim.schedule import learning_rate
from fastllama.planning.flops import flops_per_token, peak_flops


class SourceLosses:
    """The mean loss of each of several sources between two rows."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._tokens_total = [0] * len(names)
        self._sums = [(0.0, 0)] * len(names)

    def observe(self, result: UpdateResult) -> None:
        """Add an update; a loss that is not finite is left out."""
        for number, source in enumerate(result.sources):
            self._tokens_total[number] = source.tokens_total
            if math.isfinite(source.loss):
                loss, tokens = self._sums[number]
                self._sums[number] = loss + source.loss * source.tokens, tokens + source.tokens

    def take(self) -> dict[str, float]:
        """The columns of all sources, and begin anew. A source that was not read has no loss."""
        columns: dict[str, float] = {}
        if len(self._names) < 2:
            return columns
        for name, total, (loss, tokens) in zip(
            self._names, self._tokens_total, self._sums, strict=True
        ):
            if tokens:
                columns[f"loss/{name}"] = loss / tokens
            columns[f"tokens/{name}"] = total
        self._sums = [(0.0, 0)] * len(self._names)
        return columns


class Recorder:
    """Makes a row of each result, for the log files, the console and the progress bar.

    A row is held until `flush`, so that a validation after the update can be added to it. Only the
    main process writes.
    """

    def __init__(
        self, config: Config, world: World, run: Path, console: Console, last_step: int
    ) -> None:
        """Open the logs in the folder `run`, of a run that resumes after update `last_step`."""
        self._config, self._world, self._run, self._console = config, world, run, console
        # Updates of this session. An update that a rewind repeats counts again.
        self._n_done = 0
        self._result: UpdateResult | None = None
        self._row: Row | None = None
        self._slow_rank = SlowRank(config.parallel.replicate)
        # Values at the last logged row, and sums since then.
        self._logged_tokens, self._logged_seconds = 0, 0.0
        self._wait_seconds = 0.0
        self._sources = SourceLosses(config.data.source_names)
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("updates"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=config.n_updates)
        self._log: MetricsLog | None = None
        self.restart(last_step)

    def restart(self, last_step: int) -> None:
        """Reopen the logs after update `last_step`; the counts of the session continue."""
        if self._world.is_main:
            self._close_log()
            tensorboard = self._config.logging.tensorboard
            named = named_columns(self._config.data)
            self._log = MetricsLog(self._run, last_step, tensorboard, self._console.print, named)
        # Of updates that are set aside.
        self._sources.take()
        self._wait_seconds = 0.0
        self._bar.reset(self._task, completed=last_step)

    def start(self) -> None:
        """Show the progress bar."""
        self._bar.start()

    def record(self, result: UpdateResult, wall_seconds: float, skipped_steps: int) -> None:
        """Make the row of an update; `wall_seconds` and `skipped_steps` count up to its end."""
        self._n_done += 1
        self._result = result
        self._slow_rank.observe(result.collective_seconds)
        self._wait_seconds += result.data_wait_seconds
        self._sources.observe(result)
        per_update = self._config.training.tokens_per_update
        tokens = self._n_done * per_update
        tok_per_s = (tokens - self._logged_tokens) / (
            result.training_seconds - self._logged_seconds
        )
        mfu_causal, mfu_palm = self._mfu(tok_per_s, result.step)
        n_updates = self._config.n_updates
        self._row = Row(
            step=result.step,
            tokens=tokens,
            tokens_total=result.step * per_update,
            loss=result.loss,
            perplexity=perplexity(result.loss),
            lr=learning_rate(result.step, n_updates, self._config.optimizer),
            grad_norm=result.grad_norm,
            tok_per_s=tok_per_s,
            time_s=wall_seconds,
            data_wait_s=self._wait_seconds,
            skipped_steps=skipped_steps,
            progress=result.step / n_updates,
            eta_s=(n_updates - result.step) * wall_seconds / self._n_done,
            mfu_causal=mfu_causal,
            mfu_palm=mfu_palm,
        )

    def add_validation(self, results: dict[str, tuple[float, float]]) -> None:
        """Add a validation to the row of the last update: loss and bits per byte of each set."""
        assert self._row is not None
        self._row.val_loss, self._row.val_bits_per_byte = next(iter(results.values()))
        if len(self._config.data.validation_names) > 1:
            for name, (loss, bits) in results.items():
                self._row.named |= {f"val_loss/{name}": loss, f"val_bits_per_byte/{name}": bits}

    def flush(self) -> None:
        """Write the held row if its update is due for logging."""
        row, self._row = self._row, None
        if row is None or self._result is None:
            return
        self._bar.update(self._task, completed=row.step)
        due = row.step % self._config.logging.log_interval == 0 or row.val_loss is not None
        if not (due or row.step in (1, self._config.n_updates)):
            return
        self._logged_tokens = row.tokens
        self._logged_seconds = self._result.training_seconds
        self._wait_seconds = 0.0
        row.named = self._sources.take() | row.named
        row.peak_gib = self._peak_gib()
        if self._world.size > 1 and (slow := self._slow_rank.find()):
            row.slow_rank, seconds = slow
            row.slow_rank_share = seconds * row.tok_per_s / self._config.training.tokens_per_update
        if self._log is not None:
            self._log.write(row)
        self._console.print(row.line())

    def sync(self) -> None:
        """Make all rows durable."""
        if self._log is not None:
            self._log.sync()

    def close(self) -> None:
        """Stop the progress bar and close the logs."""
        self._bar.stop()
        self._close_log()

    def _close_log(self) -> None:
        if self._log is not None:
            self._log.close()

    def _mfu(self, tok_per_s: float, step: int) -> tuple[float | None, float | None]:
        if self._world.device.type != "cuda":
            return None, None
        peak = peak_flops(torch.cuda.get_device_name(self._world.device))
        if peak is None:
            return None, None
        per_flop = tok_per_s / (peak * self._world.size)
        model = self._config.at(step).model
        return (
            flops_per_token(model, causal=True) * per_flop,
            flops_per_token(model, causal=False) * per_flop,
        )

    def _peak_gib(self) -> float | None:
        if self._world.device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self._world.device) / 2**30


def perplexity(loss: float) -> float:
    """The exponential of a loss in nats; infinite where it overflows."""
    return math.inf if loss >= 700 else math.exp(loss)
