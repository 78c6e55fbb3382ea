"""Runs fastllama's training loop, or single updates of it, for the benchmarks."""

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

from benchmarks.training.job import Budget, Job, Trained
from fastllama.checkpoints.state import TrainState
from fastllama.config import Config
from fastllama.data.loader import BatchLoader
from fastllama.distributed.compilation import CompileWatch
from fastllama.distributed.world import World
from fastllama.logs.rows import read_rows
from fastllama.run_folder import RunFolder
from fastllama.train import run_updates, train_step
from fastllama.training.monitor import UpdateMonitor
from fastllama.training.session import Session
from fastllama.training.setup import (
    build_state,
    choose_operators,
    find_start,
    open_loader,
    open_session,
)
from fastllama.training.side_jobs import SideJobs
from fastllama.training.stopping import StopSignal
from fastllama_kernels import REFERENCE


class _BudgetSideJobs:
    """Stand-in for SideJobs. Its validation runs after every update and requests the stop."""

    def __init__(
        self, session: Session, state: TrainState, budget: Budget, stop: StopSignal
    ) -> None:
        self.session = session
        self.monitor = UpdateMonitor(session, state.progress)
        self.compile_watch = CompileWatch(
            session.config, session.world, session.console, time.perf_counter()
        )
        self._budget, self._stop = budget, stop

    def validate(self) -> None:
        self._stop.signalled = self._budget.is_spent()

    def save(self) -> None:
        """No-op: a measurement writes no checkpoint."""

    sample = finish = save


def train_fastllama(job: Job) -> Trained:
    """Run the loop of `fastllama train` without side jobs. Times come from its own log.

    The loop reacts to a stop request one or two updates later, as it does to a signal.
    """
    config = replace(job.config, training=replace(job.config.training, eval_interval=1))
    stop = StopSignal()
    with ExitStack() as stack:
        run = RunFolder(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        console = Console(file=stack.enter_context(open(os.devnull, "w")))
        session = stack.enter_context(open_session(config, run, console, resume=False))
        operators, chosen = choose_operators(session)
        plain = {name: getattr(REFERENCE, name) for name in job.plain_operators}
        state = build_state(session, find_start(session), replace(operators, **plain))
        jobs = cast(SideJobs, _BudgetSideJobs(session, state, job.budget, stop))
        run_updates(state, stop, jobs)
        rows = read_rows(run.metrics_csv)
    compiled = "blocks compiled" if config.training.compile else "not compiled"
    return Trained(
        losses=[row["loss"] for row in rows],
        seconds=[config.training.tokens_per_update / row["tok_per_s"] for row in rows],
        details="; ".join([chosen, session.memory, compiled, *(f"plain {name}" for name in plain)]),
    )


@contextmanager
def open_training(config: Config) -> Iterator[tuple[Session, TrainState, BatchLoader]]:
    """Set up a fresh run of `config`: what `train_step` takes."""
    with ExitStack() as stack:
        run = RunFolder(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        console = Console(quiet=True)
        session = stack.enter_context(open_session(config, run, console, resume=False))
        operators, _ = choose_operators(session)
        state = build_state(session, find_start(session), operators)
        yield session, state, stack.enter_context(open_loader(session, state))


@contextmanager
def trainer_step(config: Config) -> Iterator[tuple[Callable[[], Tensor], World]]:
    """Yield a function that runs the next update of a fresh run of `config`, and its world."""
    with open_training(config) as (session, state, loader):
        yield lambda: train_step(session, state, loader, StopSignal()), session.world
