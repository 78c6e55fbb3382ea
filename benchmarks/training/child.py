"""A contender in a process of its own, and the micro-batch that suits it."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.training.job import Outcome, Spec
from benchmarks.training.workload import workload
from fastllama.config import Config

ROOT = Path(__file__).parents[2]
WARM_UPS, LEAST_UPDATES = 2, 3
TRY_WARM_UPS, TRY_UPDATES = 1, 2
TRY_FRACTION = 8
"""An update of a try is this part of a real one."""
GAIN = 1.01
"""A larger micro-batch has to be this much faster to be worth its memory."""
CHILD_SECONDS = 1200.0
"""Beyond what it measures, a child may take this long to import, compile and end."""
END_SECONDS = 8.0
"""Of a deadline, what a child needs to write what it measured and to end."""


@dataclass(frozen=True)
class Child:
    """Starts the processes of one contender."""

    contender: str
    folder: Path
    seconds: float
    deadline: float | None
    plain_operators: tuple[str, ...] = ()

    def train(self, config: Config, *, search: bool) -> tuple[int, Outcome]:
        """Train at the batch size found, or at that of `config`, halved until it fits."""
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
        """Train at the batch size of `config`, whether that fits or not."""
        return self._run(config, self.seconds, WARM_UPS, LEAST_UPDATES)

    def rate(self, config: Config, batch_size: int) -> float | None:
        """Tokens/s in a short try; 0 where it failed, None where memory did not suffice."""
        sequences = batch_size * max(1, config.sequences_per_update // TRY_FRACTION // batch_size)
        tokens = sequences * config.model.max_seq_len
        config = workload(with_batch_size(config, batch_size), tokens)
        outcome = self._run(config, 0.0, TRY_WARM_UPS, TRY_UPDATES)
        if outcome.is_out_of_memory:
            return None
        return 0.0 if outcome.failure else tokens / min(outcome.update_seconds)

    def _run(self, config: Config, seconds: float, warm_ups: int, least_updates: int) -> Outcome:
        """One process, and what came of it, however it ends."""
        spec = Spec(
            contender=self.contender,
            config=config.to_dict(),
            warm_ups=warm_ups,
            least_updates=least_updates,
            seconds=seconds,
            spawned_at=time.time(),
            plain_operators=list(self.plain_operators),
            deadline=None if self.deadline is None else self.deadline - END_SECONDS,
        )
        timeout = CHILD_SECONDS + seconds
        if self.deadline is not None:
            timeout = min(timeout, max(0.0, self.deadline - time.time()))
        return run_child(spec, self.folder, timeout)


def run_child(spec: Spec, folder: Path, timeout: float) -> Outcome:
    """Run `spec` in a process of its own, killed with all it started after `timeout` seconds."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        specification, written = Path(name, "spec.json"), Path(name, "outcome.json")
        specification.write_text(json.dumps(asdict(spec)))
        command = [
            sys.executable,
            "-m",
            "benchmarks.training.contenders",
            str(specification),
            str(written),
        ]
        paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        with open(Path(name, "stderr"), "w+") as errors:
            process = subprocess.Popen(
                command,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env=environment,
                start_new_session=True,
            )
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                return Outcome(failure=f"stopped after {timeout:.0f} s, before it was done")
            finally:
                # The compiler's workers are of the same session.
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            if process.returncode == 0:
                return Outcome(**json.loads(written.read_text()))
            errors.seek(0)
            lines = errors.read().strip().splitlines()
        ended = (
            f"killed by {signal.Signals(-process.returncode).name}"
            if process.returncode < 0
            else f"ended with {process.returncode}"
        )
        return Outcome(failure=lines[-1] if lines else ended)


def best_batch_size(
    start: int, sequences_per_update: int, rate: Callable[[int], float | None]
) -> int:
    """The micro-batch to train with, by short tries: `rate` is tokens/s, None out of memory."""
    size, fastest = start, rate(start)
    while fastest is None and size > 1:
        size = smaller(size, sequences_per_update)
        fastest = rate(size)
    # What did not fit once is not tried again.
    while fastest and size >= start and sequences_per_update % (2 * size) == 0:
        faster = rate(2 * size)
        if faster is None or faster <= GAIN * fastest:
            break
        size, fastest = 2 * size, faster
    return size


def smaller(size: int, sequences_per_update: int) -> int:
    """The largest micro-batch of at most half the size that divides an update."""
    return next(n for n in range(size // 2, 0, -1) if sequences_per_update % n == 0)


def with_batch_size(config: Config, batch_size: int) -> Config:
    """`config` with micro-batches of `batch_size` sequences."""
    return replace(config, training=replace(config.training, batch_size=batch_size))
