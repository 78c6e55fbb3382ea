"""Training: what one update does, and the loop around it."""

import math
import time
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from fastllama.checkpoints.folder import mend_latest, set_aside
from fastllama.checkpoints.reading import load_tensors, newest_checkpoint, read_progress
from fastllama.checkpoints.state import TrainProgress, TrainState
from fastllama.checkpoints.writing import CheckpointWriter
from fastllama.config import Config, validate
from fastllama.data.dataset import Dataset, open_dataset
from fastllama.data.loader import BatchLoader
from fastllama.distributed.compilation import CompileWatch, compile_model, refuse_missing_compiler
from fastllama.distributed.determinism import deterministic_algorithms, fix_cublas_workspace
from fastllama.distributed.flight_recorder import record_collectives
from fastllama.distributed.fsdp import resolve_resharding, set_last_micro_batch, shard_model
from fastllama.distributed.world import World, choose_device, distributed, world_size
from fastllama.errors import TrainingFailedError
from fastllama.logs.recorder import Recorder
from fastllama.model.activation_checkpointing import checkpoint_activations
from fastllama.model.llama import Llama
from fastllama.model.operator_choice import choose_operators
from fastllama.optim.adamw import build_optimizer, update
from fastllama.optim.schedule import learning_rate
from fastllama.optim.spikes import SpikeDetector
from fastllama.planning.flops import n_parameters
from fastllama.run_folder import RunFolder, run_identity
from fastllama.training.rewind import Rewinder
from fastllama.training.side_jobs import SideJobs, checkpoint_due, sample_due, validation_due
from fastllama.training.stopping import StopSignal, stop_signals
from fastllama_kernels import Operators


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
    would change what its progress means. `console` should print text as it is, without markup.

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
    with ExitStack() as held:
        limit = 60 * (config.training.max_wall_time or math.inf)
        stop = held.enter_context(stop_signals(began + limit))
        validate(config, world_size())
        dataset = open_dataset(config)
        dumps = prepare_process(config, run)
        world = held.enter_context(distributed(config))
        held.enter_context(deterministic_algorithms(config.training.deterministic))
        # Before anything of the run is read, which another process may be about to finish.
        world.from_main(lambda: held.enter_context(run.locked()))
        if not resume:
            world.from_main(lambda: run.refuse_other_options(config))
        identity = run_identity(config, dataset)
        checkpoint, passed_over = newest_checkpoint(run.checkpoints, identity)
        if checkpoint is not None:
            mend_latest(checkpoint)
        progress = world.from_main(
            lambda: read_progress(checkpoint) if checkpoint else TrainProgress()
        )
        if progress.step >= config.n_updates:
            console.print(f"{run.path} has done all of its {config.n_updates} updates.")
            return True
        operators, kernels = choose_operators(config, world)
        # The run folder keeps the options as they were given.
        resolved, memory = resolve_resharding(config, world)
        choices = {"kernels": kernels, "memory": memory}
        if dumps is not None:
            choices["hangs"] = f"{dumps}RANK, written where a collective times out"

        def claim() -> None:
            run.create(config, dataset.folder / "tokenizer.json")
            set_passed_over_aside(passed_over, console)
            announce(config, dataset, world, run, progress, console, choices)

        world.from_main(claim)
        if dumps is not None:
            # Where the nodes share no disk, the main process has made it on its own only.
            Path(dumps).parent.mkdir(parents=True, exist_ok=True)
        early = f"Stopped before update {progress.step + 1}: there was nothing new to save."
        if stop.agreed(world):
            console.print(early)
            return False
        state = build_state(resolved, world, operators, progress, checkpoint)
        if stop.agreed(world):
            console.print(early)
            return False
        recorder = Recorder(config, run, dataset, progress, world, console)
        watch = CompileWatch(resolved, world, console, began)
        writer = held.enter_context(
            CheckpointWriter(run.checkpoints, config, identity, world.device, console.print)
        )
        jobs = SideJobs(state, config, run, dataset, world, console, recorder, writer)
        rewinder = Rewinder(state, writer, run.checkpoints, identity, world, console)
        held.enter_context(explained_out_of_memory(progress))
        while True:
            with open_loader(state, config, dataset, world) as loader:
                finished = run_updates(state, loader, stop, resolved, world, watch, recorder, jobs)
            if recorder.refused_series is None:
                return finished
            with recorder.side_job():
                rewinder.go_back(recorder.refused_series)
                recorder.rewind()


def prepare_process(config: Config, run: RunFolder) -> str | None:
    """Set what the environment must hold before there is a process group.

    Returns:
        Where a collective that times out is recorded, but for the rank; None where none is.

    Raises:
        ValueError: the device, or the compiler it would need, is missing.
    """
    device = choose_device(config.training.device)
    if config.training.compile and device.type == "cpu":
        refuse_missing_compiler()
    if config.training.deterministic:
        fix_cublas_workspace()
    if device.type == "cuda" and world_size() > 1:
        return record_collectives(run.path)
    return None


@contextmanager
def explained_out_of_memory(progress: TrainProgress) -> Iterator[None]:
    """Have a device that is too small end the run in a sentence with the remedies."""
    try:
        yield
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
    progress: TrainProgress,
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


def set_passed_over_aside(passed_over: dict[Path, str], console: Console) -> None:
    """Say why checkpoints newer than the one the run goes on from are not used; keep them."""
    for path, reason in passed_over.items():
        aside = set_aside(path)
        console.print(f"Passing over a checkpoint: {reason}. It is kept as {aside.name}.")


def announce(
    config: Config,
    dataset: Dataset,
    world: World,
    run: RunFolder,
    progress: TrainProgress,
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
        f"{training.training_tokens / dataset.train.n_tokens:.2f} epochs wanted; "
        f"{held_out(dataset)}",
        f"update  {training.tokens_per_update:,} tokens = {world.size} x "
        f"{config.accumulation_steps(world.size)} micro-batches of {training.batch_size} x "
        f"{model.max_seq_len}",
        f"device  {world.size} x {device}, {training.dtype}{replicas}",
        *(f"{name:7} {choice}" for name, choice in choices.items()),
    )
    console.print("\n".join(lines))


def held_out(dataset: Dataset) -> str:
    """How much there is to validate on, or why there is no validation and what would change it."""
    if dataset.validation is not None:
        return f"{dataset.validation.n_tokens:,} held out"
    little = "validation" in dataset.manifest.splits
    what = "less than a sequence" if little else "nothing"
    return f"{what} held out: no validation (prepare --validation-fraction)"
