"""Training: one update, and the loop around it."""

import math
import time
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from fastllama.checkpoints.state import TrainState
from fastllama.config import Config
from fastllama.data.loader import BatchLoader
from fastllama.distributed.determinism import explained_nondeterminism
from fastllama.distributed.fsdp import set_last_micro_batch, sum_in_matmuls, sums_in_matmuls
from fastllama.optim.clipping import update
from fastllama.optim.schedule import learning_rate
from fastllama.run_folder import RunFolder
from fastllama.training.session import Session
from fastllama.training.setup import (
    build_state,
    explained_out_of_memory,
    find_start,
    open_loader,
    open_session,
    start_run,
)
from fastllama.training.side_jobs import (
    SideJobs,
    checkpoint_due,
    sample_due,
    side_jobs,
    validation_due,
)
from fastllama.training.stopping import StopSignal, stop_signals


def train_step(
    session: Session, state: TrainState, loader: BatchLoader, stop: StopSignal
) -> Tensor:
    """Do one optimizer update over the next `tokens_per_update` tokens.

    Nothing here waits for the device.

    Returns:
        float32 (4 + ranks,) on the device, the same on every rank: loss before the update, gradient
        norm, index in `SKIP_REASONS`, more than 0 if any rank was asked to stop, and the seconds
        that each rank spent in collectives two updates earlier.
    """
    config, world, progress = session.config, session.world, state.progress
    step = progress.step + 1
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(step, config.n_updates, config.optimizer)
    if config.model.dropout:
        # A function of the update, so that a checkpoint needs no random state.
        torch.manual_seed(zlib.crc32(f"{config.training.seed} {step} {world.rank}".encode()))
    # Each rank fills a place of its own, so that the mean of all is what each has filled.
    seconds = torch.zeros(world.size, device=world.device)
    # Assigned by index, the number would be copied to the device, and the host would wait.
    seconds[world.rank].fill_(world.size * world.collectives.lap())
    n_micro_batches = config.accumulation_steps(world.size)
    loss = torch.zeros((), device=world.device)
    if sums_in_matmuls(config, world):
        sum_in_matmuls(state.model)
    with state.computing():
        for micro_batch in range(n_micro_batches):
            is_last = micro_batch == n_micro_batches - 1
            set_last_micro_batch(state.model, is_last, config.parallel)
            micro_loss = state.model(*loader.next()) / n_micro_batches
            micro_loss.backward()
            loss += micro_loss.detach()
    stopping = torch.full((), float(stop.requested), device=world.device)
    means = world.mean(torch.cat((torch.stack((loss, stopping)), seconds)))
    loss, stopping = means[:2]
    norm, skipped = update(state.optimizer, loss, config.optimizer.grad_clip, state.spikes)
    if state.average is not None:
        state.average.update(step)
    progress.step = step
    progress.position += config.sequences_per_update
    return torch.cat((torch.stack((loss, norm, skipped, stopping)), means[2:]))


def run_updates(state: TrainState, loader: BatchLoader, stop: StopSignal, jobs: SideJobs) -> None:
    """Do updates and side jobs until the last update, a stop, or a rewind."""
    session, monitor, progress = jobs.session, jobs.monitor, state.progress
    config = session.config
    with monitor:
        if progress.step == 0:
            jobs.sample()
        while progress.step < config.n_updates and not monitor.wants_to_pause:
            with jobs.compile_watch.update(progress.step + 1):
                values = train_step(session, state, loader, stop)
            monitor.push(values, loader.wait_seconds)
            if validation_due(progress.step, config):
                jobs.validate()
            if sample_due(progress.step, config):
                jobs.sample()
            if checkpoint_due(progress.step, config):
                jobs.save()
        # The result of the last update may still be on its way.
        monitor.flush()
        if monitor.skipped.series is None:
            jobs.finish()
    # torchrun ends all ranks when the first one exits with a code other than 0.
    dist.barrier()


def train(
    config: Config,
    run: RunFolder,
    console: Console,
    *,
    resume: bool = False,
    checkpoint: Path | None = None,
) -> bool:
    """Train `config` in the folder `run`, from its newest checkpoint if it has one.

    With `resume` the options may differ from the run's earlier ones, except those of
    `run_identity`. `checkpoint` is where to resume instead: a checkpoint of `run`, of which later
    ones are set aside, or one of another run, which `run` branches off from if it has none of its
    own. `console` should print text without markup.

    Returns:
        Whether all updates are done; False when a signal or `training.max_wall_time` stopped it.

    Raises:
        ValueError: options, data, device and run folder do not fit together. Nothing was written.
        TrainingFailedError: too many updates in a row were skipped, the device has too little
            memory, or an operator has no deterministic implementation and `training.deterministic`
            is set.
        OSError: the last checkpoint could not be written. The previous one is whole.
    """
    began = time.perf_counter()
    deadline = began + 60 * (config.training.max_wall_time or math.inf)
    with (
        stop_signals(deadline) as stop,
        open_session(config, run, console, resume=resume) as session,
    ):
        start = find_start(session, checkpoint)
        step, n_updates = start.progress.step, config.n_updates
        if step >= n_updates:
            console.print(f"{run.path} has done all of its {n_updates} updates.")
            return True
        operators = start_run(session, start)
        state = None
        if not stop.agreed(session.world):
            state = build_state(session, start, operators)
        if state is None or stop.agreed(session.world):
            console.print(f"Stopped before update {step + 1}: there was nothing new to save.")
            return False
        with (
            side_jobs(session, state, began) as jobs,
            # Before `side_jobs` waits for a checkpoint that is being written.
            session.world.failures_told(),
            explained_nondeterminism(),
            explained_out_of_memory(session.config, progress=state.progress),
        ):
            while True:
                with open_loader(session, state) as loader:
                    run_updates(state, loader, stop, jobs)
                if jobs.monitor.skipped.series is None:
                    return state.progress.step == n_updates
                jobs.rewind()
