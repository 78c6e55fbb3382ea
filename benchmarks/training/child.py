"""Runs a contender in a child process and searches for its best micro-batch size."""

import json
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.forks import run_forked
from benchmarks.training.contenders import write_outcome
from benchmarks.training.job import Outcome, Spec
from benchmarks.training.workload import workload
from fastllama.config import Config

WARM_UPS, MIN_UPDATES = 2, 3
TRIAL_WARM_UPS, TRIAL_UPDATES = 1, 2
TRIAL_FRACTION = 8
"""A trial update has 1 / TRIAL_FRACTION of the tokens of a real update."""
MIN_GAIN = 1.01
"""Least speedup for which the search accepts a larger micro-batch."""
CHILD_OVERHEAD_SECONDS = 1200.0
"""Time limit for compilation and shutdown, on top of the measured seconds."""
SHUTDOWN_SECONDS = 8.0
"""Reserved before a deadline, for the child to write its outcome and exit."""


@dataclass(frozen=True)
class Child:
    """Starts the child processes of one contender."""

    contender: str
    folder: Path
    seconds: float
    deadline: float | None
    plain_operators: tuple[str, ...] = ()

    def train(self, config: Config, *, search: bool) -> tuple[int, Outcome]:
        """Train, and return the batch size and the outcome.

        With `search` the batch size is the best one found, otherwise the one in `config`. It is
        halved until the run fits into memory.
        """
        size = config.training.batch_size
        if search:
            size = best_batch_size(
                size, config.sequences_per_update, lambda size: self.rate(config, size)
            )
        while True:
            outcome = self.train_once(with_batch_size(config, size))
            if not outcome.is_out_of_memory or size == 1:
                return size, outcome
            size = smaller(size, config.sequences_per_update)

    def train_once(self, config: Config) -> Outcome:
        """Train once at the batch size of `config`, without retrying when out of memory."""
        return self._run(config, self.seconds, WARM_UPS, MIN_UPDATES)

    def rate(self, config: Config, batch_size: int) -> float | None:
        """Tokens/s of a short trial; 0 if it failed, None if out of memory."""
        sequences = batch_size * max(1, config.sequences_per_update // TRIAL_FRACTION // batch_size)
        tokens = sequences * config.model.max_seq_len
        config = workload(with_batch_size(config, batch_size), tokens)
        outcome = self._run(config, 0.0, TRIAL_WARM_UPS, TRIAL_UPDATES)
        if outcome.is_out_of_memory:
            return None
        return 0.0 if outcome.failure else tokens / min(outcome.update_seconds)

    def _run(self, config: Config, seconds: float, warm_ups: int, min_updates: int) -> Outcome:
        """Run one child process and return its outcome, even if it dies."""
        spec = Spec(
            contender=self.contender,
            config=config.to_dict(),
            warm_ups=warm_ups,
            min_updates=min_updates,
            seconds=seconds,
            plain_operators=list(self.plain_operators),
            deadline=None if self.deadline is None else self.deadline - SHUTDOWN_SECONDS,
        )
        timeout = CHILD_OVERHEAD_SECONDS + seconds
        if self.deadline is not None:
            timeout = min(timeout, max(0.0, self.deadline - time.time()))
        return run_child(spec, self.folder, timeout)


def run_child(spec: Spec, folder: Path, timeout: float) -> Outcome:
    """Run `spec` in a process of its own. After `timeout` seconds kill it and its descendants."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        written, log = Path(name, "outcome.json"), Path(name, "log")
        code = run_forked(write_outcome, (spec, written), log, timeout)
        if code is None:
            return Outcome(failure=f"timed out after {timeout:.0f} s")
        if code == 0:
            return Outcome(**json.loads(written.read_text()))
        lines = log.read_text().strip().splitlines()
    ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return Outcome(failure=lines[-1] if lines else ended)


def best_batch_size(
    start: int, sequences_per_update: int, rate: Callable[[int], float | None]
) -> int:
    """Search for the best micro-batch size.

    From `start` the size is halved until it fits, or doubled for as long as the rate improves.
    `rate` gives the tokens/s of a trial, or None if out of memory.
    """
    size, fastest = start, rate(start)
    while fastest is None and size > 1:
        size = smaller(size, sequences_per_update)
        fastest = rate(size)
    # If `start` did not fit, larger sizes are not tried.
    while fastest and size >= start and sequences_per_update % (2 * size) == 0:
        faster = rate(2 * size)
        if faster is None or faster <= MIN_GAIN * fastest:
            break
        size, fastest = 2 * size, faster
    return size


def smaller(size: int, sequences_per_update: int) -> int:
    """Largest micro-batch size of at most `size // 2` that divides an update."""
    return next(n for n in range(size // 2, 0, -1) if sequences_per_update % n == 0)


def with_batch_size(config: Config, batch_size: int) -> Config:
    """`config` with micro-batches of `batch_size` sequences."""
    return replace(config, training=replace(config.training, batch_size=batch_size))
