"""Training: what one update does, and the loop around it."""

import dataclasses
import math
import os
import signal
import time
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from fastllama.atomic import locked
from fastllama.checkpoint import (
    Progress,
    load_tensors,
    newest_checkpoint,
    read_progress,
    set_aside,
)
from fastllama.checkpoint_writer import CheckpointWriter, mend_latest
from fastllama.compilation import CompileWatch, compile_model, refuse_missing_compiler
from fastllama.config import Config, validate
from fastllama.data.dataset import Dataset, open_dataset
from fastllama.data.loader import BatchLoader
from fastllama.determinism import deterministic_algorithms, fix_cublas_workspace
from fastllama.errors import TrainingFailedError
from fastllama.estimate import n_parameters
from fastllama.flight_recorder import record_collectives
from fastllama.model import Llama
from fastllama.operators import choose_operators
from fastllama.optimizer import build_optimizer, update
from fastllama.parallel import (
    World,
    choose_device,
    distributed,
    resolve_resharding,
    set_last_micro_batch,
    shard_model,
    world_size,
)
from fastllama.recompute import checkpoint_activations
from fastllama.recorder import Recorder
from fastllama.rewind import Rewinder
from fastllama.run import RunFolder
from fastllama.schedule import learning_rate
from fastllama.side_jobs import SideJobs, checkpoint_due, sample_due, validation_due
from fastllama.spikes import SpikeDetector
from fastllama.state import TrainState
from fastllama_kernels import Operators


@dataclass
class StopSignal:
    """Whether this process was asked to stop, by a signal or because its time is up."""

    deadline: float = math.inf
    """What `time.perf_counter` says when the time is up."""
    signalled: bool = False

    @property
    def requested(self) -> bool:
        return self.signalled or time.perf_counter() >= self.deadline


def train_step(
    state: TrainState, loader: BatchLoader, stop: StopSignal, config: Config, world: World
) -> Tensor:
    """Do one optimizer update over the next `tokens_per_update` tokens.

    Nothing here waits for the device.

    Returns:
        float32 (4,) on the device, the same on every process: loss before the update, gradient
        norm, why the update was refused (`REFUSALS`), more than 0 if any process was asked to stop.
    """
    step = state.progress.step + 1
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(step, config)
    if config.model.dropout:
        # A function of the update, so that nothing random has to be saved to resume.
        torch.manual_seed(zlib.crc32(f"{config.training.seed} {step} {world.rank}".encode()))
    n_micro_batches = config.accumulation_steps(world.size)
    loss = torch.zeros((), device=world.device)
    for micro_batch in range(n_micro_batches):
        is_last = micro_batch == n_micro_batches - 1
        set_last_micro_batch(
            cast(FSDPModule, state.model), is_last, bool(config.parallel.reshard_after_forward)
        )
        micro_loss = state.model(*loader.next()) / n_micro_batches
        micro_loss.backward()
        loss += micro_loss.detach()
    stopping = torch.full((), float(stop.requested), device=world.device)
    loss, stopping = world.mean(torch.stack((loss, stopping)))
    norm, refused = update(state.optimizer, loss, config.optimizer.grad_clip, state.spikes)
    state.progress.step = step
    state.progress.position += config.sequences_per_update
    return torch.stack((loss, norm, refused, stopping))


def train(config: Config, run: RunFolder, console: Console, *, resume: bool = False) -> bool:
    """Train `config` in the folder `run`, from its newest checkpoint if it has one.

    With `resume` the options may differ from those the run was started with, except where that
    would change what its progress means.

    Returns:
        Whether all updates are done; False when a signal or `training.max_wall_time` stopped it.

    Raises:
        ValueError: the configuration, the data, the device or the run folder do not fit together;
            nothing has been written then.
        TrainingFailedError: update after update was refused, the device has too little memory, or
            an operator has no deterministic implementation where `training.deterministic` asks.
        OSError: the last checkpoint could not be written; the one before it is whole.
    """
    began = time.perf_counter()
    validate(config, world_size())
    dataset = open_dataset(config)
    device = choose_device(config.training.device)
    if config.training.compile and device.type == "cpu":
        refuse_missing_compiler()
    if run.exists and not resume:
        refuse_other_options(run, config)
    identity = run_identity(config, dataset)
    dumps = None
    if device.type == "cuda" and world_size() > 1:
        dumps = record_collectives(run.path)
    if config.training.deterministic:
        fix_cublas_workspace()
    with (
        ExitStack() as held,
        distributed(config) as world,
        deterministic_algorithms(config.training.deterministic),
    ):
        checkpoint, passed_over = newest_checkpoint(run.checkpoints, identity)
        if checkpoint is not None:
            mend_latest(checkpoint)
        progress = world.from_main(lambda: read_progress(checkpoint) if checkpoint else Progress())
        if progress.step >= config.n_updates:
            done = f"{run.path} has done all of its {config.n_updates} updates."
            console.print(done, highlight=False, soft_wrap=True, markup=False)
            return True

        def claim() -> None:
            run.path.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(run.path))
            run.create(config, dataset.folder / "tokenizer.json")
            refuse_passed_over(passed_over, console)
            announce(config, dataset, world, run, progress, console, choices)

        operators, kernels = choose_operators(config, world)
        # The run folder keeps the options as they were given.
        resolved, memory = resolve_resharding(config, world)
        choices = {"kernels": kernels, "memory": memory}
        if dumps is not None:
            choices["hangs"] = f"{dumps}RANK, written where a collective times out"
        world.from_main(claim)
        if dumps is not None:
            # Where the nodes share no disk, the main process has made it on its own only.
            Path(dumps).parent.mkdir(parents=True, exist_ok=True)
        state = build_state(resolved, world, operators, progress, checkpoint)
        recorder = Recorder(config, run, dataset, progress, world, console)
        watch = CompileWatch(resolved, world, console, began)
        writer = CheckpointWriter(
            run.checkpoints,
            config,
            identity,
            world.device,
            lambda sentence: console.print(sentence, highlight=False, soft_wrap=True, markup=False),
        )
        jobs = SideJobs(state, config, run, dataset, world, console, recorder, writer)
        rewinder = Rewinder(state, writer, run.checkpoints, identity, world, console)
        deadline = began + 60 * (config.training.max_wall_time or math.inf)
        with stop_signals(deadline) as stop, writer:
            try:
                while True:
                    with open_loader(state, config, dataset, world) as loader:
                        finished = run_updates(
                            state, loader, stop, resolved, world, watch, recorder, jobs
                        )
                    if recorder.refused_series is None:
                        return finished
                    rewinder.go_back(recorder.refused_series)
                    jobs.recorder = recorder = Recorder(
                        config, run, dataset, progress, world, console
                    )
            except torch.OutOfMemoryError as error:
                raise TrainingFailedError(
                    f"Out of memory in update {progress.step + 1} ({error}); lower "
                    "training.batch_size, or set parallel.reshard_after_forward = true or "
                    "training.activation_checkpointing."
                ) from None


def run_updates(
    state: TrainState,
    loader: BatchLoader,
    stop: StopSignal,
    config: Config,
    world: World,
    watch: CompileWatch,
    recorder: Recorder,
    jobs: SideJobs,
) -> bool:
    """The loop; returns whether all updates are done, which refused ones may have to be again."""
    progress = state.progress
    with recorder:
        if progress.step == 0:
            jobs.sample()
        while progress.step < config.n_updates and not (recorder.stop or recorder.refused_series):
            with watch.update(progress.step + 1):
                values = train_step(state, loader, stop, config, world)
            recorder.push(values, loader.wait_seconds)
            if validation_due(progress.step, config):
                jobs.validate()
            if sample_due(progress.step, config):
                jobs.sample()
            if checkpoint_due(progress.step, config):
                jobs.save()
        # That of the last update may be under way still.
        recorder.flush()
        if recorder.refused_series is None:
            jobs.finish()
    # Launchers end the other ranks when the first one leaves with a code that is not 0.
    dist.barrier()
    return progress.step == config.n_updates


def build_state(
    config: Config,
    world: World,
    operators: Operators,
    progress: Progress,
    checkpoint: Path | None,
) -> TrainState:
    """The model, sharded and on the device, and its optimizer; fresh or as saved."""
    with torch.device("meta"):
        model = Llama(config.model, operators)
    checkpoint_activations(model, config)
    if config.training.compile:
        compile_model(model, config)
    shard_model(model, config, world)
    model.init_weights(config.training.seed)
    spikes = None
    if z_score := config.training.spike_z_score:
        spikes = SpikeDetector(z_score, world.device, progress.spikes)
    state = TrainState(model, build_optimizer(model, config.optimizer), progress, spikes)
    if checkpoint is not None:
        load_tensors(checkpoint, state.tensors())
    return state


def open_loader(state: TrainState, config: Config, dataset: Dataset, world: World) -> BatchLoader:
    """Micro-batches of this process from where the run stands."""
    return BatchLoader(
        dataset.train,
        seq_len=config.model.max_seq_len,
        batch_size=config.training.batch_size,
        seed=config.training.seed,
        device=world.device,
        position=state.progress.position,
        rank=world.rank,
        world_size=world.size,
        depth=config.data.prefetch,
    )


def run_identity(config: Config, dataset: Dataset) -> dict[str, Any]:
    """What may not change in a run: its model, its data, and the order of its data."""
    model = {f"model.{name}": value for name, value in dataclasses.asdict(config.model).items()}
    del model["model.dropout"]
    return {
        **model,
        "training.seed": config.training.seed,
        "training.tokens_per_update": config.training.tokens_per_update,
        "data.fingerprint": dataset.manifest.fingerprint(),
        "data.end_token_id": dataset.manifest.end_token_id,
    }


def refuse_other_options(run: RunFolder, config: Config) -> None:
    """Raise ValueError if `run` was started with other options than `config`."""
    before, now = run.load_config().to_dict(), config.to_dict()
    for group, options in now.items():
        for name in sorted(options.keys() | before[group].keys()):
            old, new = before[group].get(name), options.get(name)
            if old != new:
                raise ValueError(
                    f"{run.path} holds a run with {group}.{name} = {old}, not {new}; give a new "
                    f"one another --run-dir, or go on with --resume {run.path}."
                )


def refuse_passed_over(passed_over: dict[Path, str], console: Console) -> None:
    """Say why checkpoints newer than the one the run goes on from are not used; keep them aside."""
    for path, reason in passed_over.items():
        aside = set_aside(path)
        message = f"Passing over a checkpoint: {reason}. It is kept as {aside.name}."
        console.print(message, highlight=False, soft_wrap=True, markup=False)


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def stop_signals(deadline: float = math.inf) -> Iterator[StopSignal]:
    """Turn the first of `STOP_SIGNALS` into a request; the next one ends the process."""
    stop = StopSignal(deadline)

    def request(number: int, frame: FrameType | None) -> None:
        stop.signalled = True
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        # Not print: the signal may have come in the middle of one.
        name = signal.Signals(number).name
        os.write(2, f"{name}: finishing the update, then saving; again to stop now\n".encode())

    previous = {number: signal.signal(number, request) for number in STOP_SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def announce(
    config: Config,
    dataset: Dataset,
    world: World,
    run: RunFolder,
    progress: Progress,
    console: Console,
    choices: dict[str, str],
) -> None:
    """Print what is about to be trained, derived values and what was chosen, and why, included."""
    model, training = config.model, config.training
    on_cuda = world.device.type == "cuda"
    device = torch.cuda.get_device_name(world.device) if on_cuda else "CPU"
    start = f"resuming after update {progress.step}" if progress.step else "starting"
    replicate = config.parallel.replicate
    replicas = f", {replicate} replicas of {world.size // replicate}" if replicate > 1 else ""
    lines = (
        f"run     {run.path}: {start} of {config.n_updates:,}",
        f"model   {n_parameters(model):,} parameters, {model.n_layers} layers of width "
        f"{model.n_embd}, feed-forward {model.ffn_hidden}",
        f"data    {dataset.folder}: {dataset.train.n_tokens:,} tokens, "
        f"{training.training_tokens / dataset.train.n_tokens:.2f} epochs wanted",
        f"update  {training.tokens_per_update:,} tokens = {world.size} x "
        f"{config.accumulation_steps(world.size)} micro-batches of {training.batch_size} x "
        f"{model.max_seq_len}",
        f"device  {world.size} x {device}, {training.dtype}{replicas}",
        *(f"{name:7} {choice}" for name, choice in choices.items()),
    )
    console.print("\n".join(lines), highlight=False, soft_wrap=True, markup=False)
