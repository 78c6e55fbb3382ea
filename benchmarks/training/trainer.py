"""fastllama's own loop, and one update of it, called from outside."""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast

from rich.console import Console
from torch import Tensor

from benchmarks.training.job import Job, Pace, Trained
from fastllama.checkpoints.state import TrainProgress
from fastllama.config import Config
from fastllama.data.dataset import open_dataset
from fastllama.distributed.compilation import CompileWatch
from fastllama.distributed.fsdp import resolve_resharding
from fastllama.distributed.world import World, distributed
from fastllama.logs.recorder import Recorder
from fastllama.logs.sinks import read_rows
from fastllama.model.operator_choice import choose_operators
from fastllama.run_folder import RunFolder
from fastllama.train import build_state, open_loader, run_updates, train_step
from fastllama.training.side_jobs import SideJobs
from fastllama.training.stopping import StopSignal
from fastllama_kernels import REFERENCE


class _LookAtThePace:
    """In the place of the side jobs: validation, due after every update, is to ask for a stop."""

    def __init__(self, pace: Pace, stop: StopSignal) -> None:
        self._pace, self._stop = pace, stop

    def validate(self) -> None:
        self._stop.signalled = self._pace.enough()

    def save(self) -> None:
        """Nothing: no checkpoint is part of a measurement."""

    sample = finish = save


def train_fastllama(job: Job) -> Trained:
    """`fastllama train` with all it does but the side jobs; times are those of its own log.

    It learns of the stop an update or two late, as when a user sends a signal.
    """
    config = replace(job.config, training=replace(job.config.training, eval_interval=1))
    dataset = open_dataset(config)
    with ExitStack() as held:
        run = RunFolder(Path(held.enter_context(tempfile.TemporaryDirectory())))
        console = Console(file=held.enter_context(open(os.devnull, "w")))
        world = held.enter_context(distributed(config))
        operators, chosen = choose_operators(config, world)
        config, memory = resolve_resharding(config, world)
        plain = {name: getattr(REFERENCE, name) for name in job.plain_operators}
        progress, stop = TrainProgress(), StopSignal()
        state = build_state(config, world, replace(operators, **plain), progress, None)
        recorder = Recorder(config, run, dataset, progress, world, console)
        watch = CompileWatch(config, world, console, time.perf_counter())
        side_jobs = cast(SideJobs, _LookAtThePace(job.pace, stop))
        loader = held.enter_context(open_loader(state, config, dataset, world))
        run_updates(state, loader, stop, config, world, watch, recorder, side_jobs)
        rows = read_rows(run.metrics_csv)
    compiled = "blocks compiled" if config.training.compile else "not compiled"
    return Trained(
        losses=[row["loss"] for row in rows],
        seconds=[config.training.tokens_per_update / row["tok_per_s"] for row in rows],
        details="; ".join([chosen, memory, compiled, *(f"plain {name}" for name in plain)]),
    )


@contextmanager
def trainer_step(config: Config) -> Iterator[tuple[Callable[[], Tensor], World]]:
    """The next update of a fresh run of `config` each time it is called, and its processes."""
    dataset = open_dataset(config)
    with distributed(config) as world:
        operators, _ = choose_operators(config, world)
        config, _ = resolve_resharding(config, world)
        state = build_state(config, world, operators, TrainProgress(), None)
        with open_loader(state, config, dataset, world) as loader:
            yield lambda: train_step(state, loader, StopSignal(), config, world), world
