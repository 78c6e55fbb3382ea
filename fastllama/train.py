"""Training: one update, and the loop around it."""

import itertools
import math
import time
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from fastllama.checkpoints.state import TrainState
from fastllama.config import Config
from fastllama.data.batch import Batch
from fastllama.data.loader import BatchLoader
from fastllama.data.packing import Packing
from fastllama.distributed.determinism import explained_nondeterminism
from fastllama.distributed.fsdp import set_last_micro_batch, sum_in_matmuls, sums_in_matmuls
from fastllama.optim.clipping import update
from fastllama.optim.schedule import learning_rate
from fastllama.run_folder import RunFolder
from fastllama.training.session import Session
from fastllama.training.setup import (
    begin_stage,
    build_state,
    claim_run_folder,
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


def sum_gradients(
    session: Session,
    config: Config,
    state: TrainState,
    next_batch: Callable[[], Batch],
    n_micro_batches: int,
) -> tuple[Tensor, Tensor | None]:
    """Run the model forward and backward over the micro-batches of an update in the stage `config`.

    Returns:
        The mean loss, a float32 scalar on the device. Of a mixture also the sum over each source's
        sequences of their mean loss, float32 (sources,).
    """
    world = session.world
    loss = torch.zeros((), device=world.device)
    of_sources = None
    if config.is_mixture:
        of_sources = torch.zeros(len(config.data.sources), device=world.device)
    summing = sum_in_matmuls(state.model) if sums_in_matmuls(config, world) else nullcontext()
    with state.computing(), summing:
        for micro_batch in range(n_micro_batches):
            is_last = micro_batch == n_micro_batches - 1
            set_last_micro_batch(state.model, is_last, config.parallel)
            inputs, targets, sources, cu_seqlens = next_batch()
            if sources is None or of_sources is None:
                micro_loss = state.model(inputs, targets, cu_seqlens=cu_seqlens)
            else:
                micro_loss, losses = state.model(
                    inputs, targets, return_losses=True, cu_seqlens=cu_seqlens
                )
                of_sources.index_add_(0, sources, losses.float().mean(1))
            micro_loss = micro_loss / n_micro_batches
            micro_loss.backward()
            loss += micro_loss.detach()
    return loss, of_sources


def train_step(
    session: Session, state: TrainState, loader: BatchLoader, stop: StopSignal
) -> Tensor:
    """Do one optimizer update over the next `tokens_per_update` tokens.

    Nothing here waits for the device.

    Returns:
        float32 (4 + ranks + sources,) on the device, the same on every rank: loss before the
        update, gradient norm, index in `SKIP_REASONS`, more than 0 if any rank was asked to stop,
        the seconds that each rank spent in collectives two updates earlier, and, of several
        sources, the sum of the losses of each source's sequences, a mean over ranks.
    """
    world, progress = session.world, state.progress
    step = progress.step + 1
    config = session.config.at(step)
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
    loss, of_sources = sum_gradients(session, config, state, loader.next, n_micro_batches)
    stopping = torch.full((), float(stop.requested), device=world.device)
    scalars = [torch.stack((loss, stopping)), seconds]
    means = world.mean(torch.cat(scalars if of_sources is None else [*scalars, of_sources]))
    loss, stopping = means[:2]
    norm, skipped = update(state.optimizer, loss, config.optimizer.grad_clip, state.spikes)
    if state.average is not None:
        state.average.update(step)
    progress.step = step
    progress.position += session.config.positions_per_update
    return torch.cat((torch.stack((loss, norm, skipped, stopping)), means[2:]))


def warm_up_stages(session: Session, state: TrainState) -> None:
    """Compile what later stages need, on batches of one token whose gradients are dropped.

    A stage then begins without a pause, and one that needs too much memory fails at the start.
    """
    device = session.world.device
    for number, stage in enumerate(session.config.data.stages):
        first_step = session.config.first_step(stage)
        if first_step <= state.progress.step + 1:
            continue
        config = session.config.at(first_step)
        shape = config.training.batch_size, config.model.max_seq_len
        # Any token but the end token, which would begin a document each time.
        tokens = torch.full(shape, int(session.dataset.end_token_id == 0))
        sources = cu_seqlens = None
        if config.is_mixture:
            sources = torch.zeros(shape[0], dtype=torch.int64, device=device)
        if (packing := Packing.of(config, session.dataset)) is not None:
            borders = packing.cu_seqlens(torch.stack((tokens, tokens)).numpy())
            cu_seqlens = torch.from_numpy(borders).to(device)
        tokens = tokens.to(device)
        # Not the same tensor twice: torch.compile would make graphs for this case only.
        batch = Batch(tokens, tokens.clone(), sources, cu_seqlens)
        # The first micro-batch of an update may run other graphs than the last.
        n_micro_batches = min(2, config.accumulation_steps(session.world.size))
        with explained_out_of_memory(config, f"in the warm-up of data.stages.{number}"):
            sum_gradients(session, config, state, itertools.repeat(batch).__next__, n_micro_batches)
        state.optimizer.zero_grad()


def run_stage(state: TrainState, loader: BatchLoader, stop: StopSignal, jobs: SideJobs) -> None:
    """Do updates and side jobs until the last update of a stage, a stop, or a rewind."""
    session, monitor, progress = jobs.session, jobs.monitor, state.progress
    config = session.config
    last_step = config.last_step(progress.step + 1)
    while progress.step < last_step and not monitor.wants_to_pause:
        waited = loader.wait_seconds
        with jobs.compile_watch.update(progress.step + 1):
            values = train_step(session, state, loader, stop)
        monitor.push(values, loader.wait_seconds - waited)
        if validation_due(progress.step, config):
            jobs.validate()
        if sample_due(progress.step, config):
            jobs.sample()
        if checkpoint_due(progress.step, config):
            jobs.save()


def run_updates(state: TrainState, stop: StopSignal, jobs: SideJobs) -> None:
    """Do updates and side jobs until the last update, a stop, or a rewind."""
    session, monitor, progress = jobs.session, jobs.monitor, state.progress
    with monitor:
        if progress.step == 0:
            jobs.sample()
        while progress.step < session.config.n_updates and not monitor.wants_to_pause:
            begin_stage(session, state)
            with open_loader(session, state) as loader:
                run_stage(state, loader, stop, jobs)
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
            if not run.exists:  # Its last checkpoint has come from `checkpoint.upload` just now.
                session.world.from_main(lambda: claim_run_folder(session, start))
            done = f"all of its {n_updates} updates"
            if step > n_updates:
                done = f"{step} updates, more than the {n_updates} of training.training_tokens"
            console.print(f"{run.path} has done {done}.")
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
            if config.data.stages:
                with jobs.compile_watch.warm_up():
                    warm_up_stages(session, state)
            while True:
                run_updates(state, stop, jobs)
                if jobs.monitor.skipped.series is None:
                    return state.progress.step == n_updates
                jobs.rewind()
