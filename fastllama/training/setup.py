"""Setting up a training: from options to a session, and from a session to a state to train."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from torch.distributed.fsdp import FSDPModule

from fastllama.atomic import set_aside
from fastllama.checkpoints.folder import NAME, complete_checkpoints, mend_latest, step_of
from fastllama.checkpoints.reading import (
    find_damage,
    find_difference,
    load_state,
    missing_checkpoint,
    newest_checkpoint,
    read_progress,
)
from fastllama.checkpoints.remote import fetch_newest, remote_run, upload_options
from fastllama.checkpoints.state import TrainProgress, TrainState
from fastllama.config import Config, validate
from fastllama.data.dataset import Dataset, open_dataset
from fastllama.data.loader import BatchLoader
from fastllama.data.packing import Packing
from fastllama.distributed.compilation import (
    compile_model,
    probe_vector_instructions,
    refuse_missing_compiler,
)
from fastllama.distributed.compute_copies import ComputeCopies
from fastllama.distributed.determinism import deterministic_algorithms, fix_cublas_workspace
from fastllama.distributed.flight_recorder import record_collectives
from fastllama.distributed.fsdp import resolve_by_memory, shard_model
from fastllama.distributed.world import (
    World,
    choose_device,
    distributed,
    nccl_settings,
    require_launcher,
    world_size,
)
from fastllama.errors import TrainingFailedError
from fastllama.model.activation_checkpointing import checkpoint_activations
from fastllama.model.llama import Llama
from fastllama.model.operator_choice import build_operators, choose_attention_backend
from fastllama.optim.adamw import build_optimizer
from fastllama.optim.ema import WeightAverage
from fastllama.optim.spikes import SpikeDetector
from fastllama.planning.flops import n_parameters
from fastllama.planning.out_of_memory import is_out_of_memory, out_of_memory
from fastllama.run_folder import RunFolder, run_identity
from fastllama.training.computation import resolve_computation
from fastllama.training.session import Session
from fastllama.weights.starting import InitialWeights, find_initial_weights
from fastllama_kernels import Operators


@contextmanager
def open_session(
    config: Config, run: RunFolder, console: Console, *, resume: bool
) -> Iterator[Session]:
    """Check the options, open the data, join the processes, lock the run folder.

    On exit, release the lock and leave the process group.

    Raises:
        ValueError: options, data, device and run folder do not fit together. Nothing was written.
    """
    require_launcher()
    validate(config, world_size())
    dataset = open_dataset(config)
    flight_records = prepare_environment(config, run)
    with (
        distributed(config) as world,
        deterministic_algorithms(config.training.deterministic),
        locked_by_main(run, world),
        explained_out_of_memory(config, "while starting"),
    ):
        if not resume:
            world.from_main(lambda: run.refuse_other_options(config))
        resolved, reason = resolve_by_memory(resolve_computation(config, world), world)
        yield Session(
            config=resolved,
            memory=reason,
            given=config,
            run=run,
            dataset=dataset,
            world=world,
            console=console,
            flight_records=flight_records,
            identity=run_identity(config, dataset),
        )


def prepare_environment(config: Config, run: RunFolder) -> str | None:
    """Set the environment variables that PyTorch reads when CUDA or the process group starts.

    Returns:
        Where NCCL's flight recorder writes, without the rank; None if it is off.

    Raises:
        ValueError: the device, or the compiler that it needs, is missing.
    """
    device = choose_device(config.training.device)
    if config.training.compile is True and device.type == "cpu":
        refuse_missing_compiler()
    if config.training.deterministic:
        fix_cublas_workspace()
    if device.type == "cuda":
        configure_allocator()
    if device.type == "cuda" and world_size() > 1:
        return record_collectives(run.path)
    return None


# In the order of PyTorch 2.13: the older name wins if both are set.
_ALLOCATOR_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def configure_allocator() -> None:
    """Save GPU and pinned host memory, unless the environment configures PyTorch's allocators.

    Segments that expand do not fragment. Pinned memory is allocated as it is asked for: without the
    setting, which is new in PyTorch 2.13, the copy for a checkpoint is rounded up tensor by tensor
    to powers of two, and kept.

    PyTorch reads the settings with the first allocation on a GPU. Only another `backend` would have
    to be set before PyTorch is imported.
    """
    if allocator_setting() is None:
        settings = ["expandable_segments:True"]
        if torch.__version__ >= "2.13":
            settings.append("pinned_max_round_threshold_mb:1")
        os.environ["PYTORCH_ALLOC_CONF"] = ",".join(settings)


def allocator_setting() -> str | None:
    """The setting of PyTorch's allocator as `NAME=VALUE`; None if there is none."""
    names = (name for name in _ALLOCATOR_SETTINGS if name in os.environ)
    return next((f"{name}={os.environ[name]}" for name in names), None)


@contextmanager
def locked_by_main(run: RunFolder, world: World) -> Iterator[None]:
    """Hold the run folder's lock on the main process.

    Take it before reading the folder: another process may be about to finish the run.
    """
    with ExitStack() as held:
        world.from_main(lambda: held.enter_context(run.locked()))
        yield


@dataclass(frozen=True)
class Start:
    """Where a training starts."""

    progress: TrainProgress
    checkpoint: Path | None
    """The checkpoint to resume from; None for a new run."""
    unusable: dict[Path, str]
    """Newer checkpoints of the run, and why each is not used."""
    weights: InitialWeights | None = None
    """The weights that a new run starts from; None draws them."""
    branched_from: Path | None = None
    """The checkpoint of another run that `--resume` names."""
    resumed_from: str | None = None
    """The name of the run's own checkpoint that `--resume` names."""


def find_start(session: Session, wanted: Path | None = None) -> Start:
    """Find the checkpoint to resume from, and read its progress.

    It is the newest whole one of the run. Or it is `wanted`, which may be of another run: then the
    run branches off from it. Either way once: the same options again go on from the newest.

    Raises:
        ValueError: every whole checkpoint belongs to another run, the folder holds a run that did
            not branch off from `wanted`, or `wanted` or the weights of `training.init_from` cannot
            be used. Or `wanted` was set aside by this run.
        OSError: `checkpoint.upload` has a newer one, and the network fails.
    """
    folder, identity = session.run.checkpoints, session.identity
    is_branch = wanted is not None and wanted.parent.resolve() != folder.resolve()
    origin = wanted if is_branch else None
    if origin is not None:
        session.world.from_main(lambda: session.run.refuse_other_branch(origin))
    if session.config.checkpoint.upload and (wanted is None or is_branch):
        fetch_copy(session)
    name = None if wanted is None or is_branch else wanted.name
    if name is not None and session.world.from_main(
        lambda: session.run.resumed_alike(name, session.given)
    ):
        wanted = None
    if wanted is None or (is_branch and session.run.has_checkpoints):
        checkpoint, unusable = newest_checkpoint(folder, identity)
    else:
        _refuse_unusable(wanted, session)
        checkpoint, unusable = wanted, {}
        if not is_branch:
            _refuse_other_name(wanted)
            for later in complete_checkpoints(folder):
                if step_of(later) > step_of(wanted):
                    unusable[later] = f"the run resumes from {wanted.name}, which is older"
    if checkpoint is None:
        config = session.config
        weights = None
        if session.run.has_checkpoints:
            session.console.print(
                f"No checkpoint of {session.run.path} can be used: it starts from the beginning. "
                "To resume from one that was set aside, give it back its name, step-N."
            )
        if config.training.init_from:
            weights = find_initial_weights(config, session.dataset)
        return Start(TrainProgress(), None, unusable, weights, origin)
    if not is_branch:
        mend_latest(checkpoint)
    progress = session.world.from_main(lambda: read_progress(checkpoint))
    return Start(progress, checkpoint, unusable, branched_from=origin, resumed_from=name)


def fetch_copy(session: Session) -> None:
    """Download the newest checkpoint of `checkpoint.upload` if the run folder has none."""
    world, run = session.world, session.run
    if world.from_main(lambda: run.has_checkpoints):
        return
    url = remote_run(session.config, run)
    fetched = fetch_newest(url, run.checkpoints, session.identity, session.console.print)
    while world.from_main(lambda: next(fetched, False)):
        pass


def _refuse_unusable(checkpoint: Path, session: Session) -> None:
    """Raise ValueError if the run cannot resume from this checkpoint. All ranks call it."""
    if not checkpoint.is_dir():
        raise ValueError(missing_checkpoint(checkpoint))
    if damage := find_damage(checkpoint):
        raise ValueError(
            f"The checkpoint is damaged: {damage}; use another one of {checkpoint.parent}."
        )
    if difference := find_difference(checkpoint, session.identity):
        raise ValueError(
            f"{difference}; keep that value to resume, or start a new run from its weights with "
            f"--training.init-from {checkpoint}."
        )


def _refuse_other_name(checkpoint: Path) -> None:
    """Raise ValueError if the run would not find this checkpoint of its own by itself."""
    if not NAME.fullmatch(checkpoint.name):
        step = read_progress(checkpoint).step
        raise ValueError(
            f"{checkpoint} is not named as a checkpoint that the run goes on from; rename it to "
            f"step-{step:08d}, or train on in another folder with --run-dir."
        )


def start_run(session: Session, start: Start) -> Operators:
    """Choose the operators, write the run folder, and print what is about to be trained.

    Raises:
        ValueError: `training.kernels` or `training.attention` cannot run here.
    """
    operators, kernels = choose_operators(session)
    session.world.from_main(lambda: claim_run_folder(session, start))
    if session.flight_records:
        # Nodes without a shared disk each need the folder. Without it only the records are missing.
        with suppress(OSError):
            Path(session.flight_records).parent.mkdir(parents=True, exist_ok=True)
    session.console.print("\n".join(describe_run(session, start, kernels)))
    return operators


def choose_operators(session: Session) -> tuple[Operators, str]:
    """Choose the operators of the model; return them, and one phrase with their names and why.

    The main process chooses for all ranks. Ranks with different backends would round differently
    and train different models.

    Raises:
        ValueError: `training.kernels` or `training.attention` cannot run here.
    """
    world = session.world
    config = max(session.config.stages, key=lambda stage: stage.model.max_seq_len)
    packing = Packing.of(config, session.dataset)
    n_documents = None if packing is None else packing.n_documents
    attention = world.from_main(lambda: choose_attention_backend(config, world.device, n_documents))
    operators = build_operators(config, world.device, attention.name)
    return operators, f"{operators.name}; attention {attention.name}: {attention.reason}"


def claim_run_folder(session: Session, start: Start) -> None:
    """Write options, tokenizer and environment of this session; set unusable checkpoints aside."""
    tokenizer = session.dataset.folder / "tokenizer.json"
    given, resolved = session.given.training, session.config.training
    chosen = {
        f"training.{name}": getattr(resolved, name)
        for name in ("dtype", "compile")
        if getattr(given, name) == "auto"
    }
    session.run.create(session.given, tokenizer, start.branched_from, start.resumed_from, chosen)
    if session.config.checkpoint.upload:
        # A mistake, such as a missing permission, is told before the training. Each upload of a
        # checkpoint does this again, so that nothing is lost with a network that fails now.
        with suppress(OSError):
            upload_options(session.run, session.config)
    for path, reason in start.unusable.items():
        aside = set_aside(path)
        session.console.print(f"Not using a checkpoint: {reason}. It is kept as {aside.name}.")


def build_state(session: Session, start: Start, operators: Operators) -> TrainState:
    """Build the sharded model and its optimizer on the device.

    New, from a checkpoint, or with the weights of another run.
    """
    config, world = session.config, session.world
    with torch.device("meta"):
        model = Llama(
            replace(config.model, max_seq_len=config.longest_seq_len),
            operators,
            z_loss=config.training.z_loss,
            label_smoothing=config.training.label_smoothing,
        )
    checkpoint_activations(model, config)
    if config.training.compile:
        compile_model(model, config)
        if world.device.type == "cpu":
            probe_vector_instructions()
    shard_model(model, config, world)
    model.init_weights(config.training.seed)
    spikes = None
    if z_score := config.training.spike_z_score:
        spikes = SpikeDetector(z_score, world.device, start.progress.spikes)
    optimizer = build_optimizer(model, config.optimizer)
    if start.weights is not None:
        start.weights.load(model, optimizer)
    average = None
    if decay := config.training.ema_decay:
        average = WeightAverage(model, decay)
    copies = None
    dtype = getattr(torch, config.training.dtype)
    if not isinstance(model, FSDPModule) and dtype != torch.float32:
        copies = ComputeCopies(model, dtype)
    state = TrainState(model, optimizer, start.progress, spikes, average, copies)
    if start.checkpoint is not None:
        load_state(start.checkpoint, state)
    return state


def begin_stage(session: Session, state: TrainState) -> None:
    """Prepare the model for the stage of the next update."""
    state.model.init_rotary(session.config.at(state.progress.step + 1).model.theta)


def open_loader(session: Session, state: TrainState) -> BatchLoader:
    """The micro-batches of this rank in the current stage, from the position of the run."""
    step, world = state.progress.step, session.world
    config = session.config.at(step + 1)
    n_left = (session.config.last_step(step + 1) - step) * config.accumulation_steps(world.size)
    return BatchLoader(
        session.dataset.train,
        seq_len=config.model.max_seq_len,
        batch_size=config.training.batch_size,
        device=world.device,
        position=state.progress.position,
        rank=world.rank,
        world_size=world.size,
        depth=min(config.data.prefetch, n_left),
        packing=Packing.of(config, session.dataset),
    )


@contextmanager
def explained_out_of_memory(
    config: Config, when: str = "", progress: TrainProgress | None = None
) -> Iterator[None]:
    """Replace an out-of-memory error, of a device or the host, by a sentence with the plan.

    `progress` names the update of the error, and `when` any other time.
    """
    try:
        yield
    except (RuntimeError, TypeError, MemoryError) as error:
        if not is_out_of_memory(error) or isinstance(error, TrainingFailedError):
            raise
        if progress is not None:
            step = progress.step + 1
            config, when = config.at(step), f"in update {step}"
        raise TrainingFailedError(out_of_memory(error, config, world_size(), when)) from None


def describe_run(session: Session, start: Start, kernels: str) -> list[str]:
    """The lines at the start of a run: options, values derived from them, choices and reasons."""
    config, world, dataset = session.config, session.world, session.dataset
    model, training = config.model, config.training
    on_cuda = world.device.type == "cuda"
    device = torch.cuda.get_device_name(world.device) if on_cuda else "CPU"
    step = start.progress.step
    begins = f"resuming after update {step}" if step else "starting"
    replicate = config.parallel.replicate
    replicas = f", {replicate} replicas of {world.size // replicate}" if replicate > 1 else ""
    lines = [
        f"run     {session.run.path}: {begins} of {config.n_updates:,}",
        f"model   {n_parameters(model):,} parameters, {model.n_layers} layers of width "
        f"{model.n_embd}, feed-forward {model.ffn_width}",
        *describe_data(config, dataset),
        f"update  {training.tokens_per_update:,} tokens = {world.size} x "
        f"{config.accumulation_steps(world.size)} micro-batches of {training.batch_size} x "
        f"{model.max_seq_len}",
        f"device  {world.size} x {device}, {training.dtype}, "
        f"{'compiled' if training.compile else 'not compiled'}{replicas}",
        f"kernels {kernels}",
        f"memory  {session.memory}",
        *describe_stages(config, dataset),
    ]
    if session.packing is not None:
        room = session.packing.n_documents
        lines.append(f"mask    documents are kept apart; room for {room} in a micro-batch")
    if start.weights is not None:
        lines.append(f"weights {start.weights}")
    if on_cuda:
        lines.append(f"alloc   {allocator_setting()}")
    if on_cuda and world.size > 1:
        lines.append(f"nccl    {nccl_settings()}")
    if session.flight_records:
        lines.append(f"hangs   {session.flight_records}RANK, written where a collective times out")
    return lines


def describe_data(config: Config, dataset: Dataset) -> list[str]:
    """The lines about the data: one of the whole, and one of each source of a mixture."""
    epochs = dataset.train.epochs(config.n_updates * config.positions_per_update)
    if len(dataset.sources) == 1:
        n_tokens = dataset.sources[0].stream.n_tokens
        return [
            f"data    {dataset.folder}: {n_tokens:,} tokens, "
            f"{config.training.training_tokens / n_tokens:.2f} epochs wanted; "
            f"{describe_validation(dataset)}"
        ]
    lines = [f"data    {len(dataset.sources)} sources; {describe_validation(dataset)}"]
    for source, share, times in zip(dataset.sources, dataset.train.shares(0), epochs, strict=True):
        lines.append(
            f"source  {source.name}: {100 * share:.4g}%, {source.stream.n_tokens:,} tokens, "
            f"{times:.2f} epochs wanted"
        )
    return lines


def describe_stages(config: Config, dataset: Dataset) -> list[str]:
    """A line about each stage."""
    lines = []
    for stage in config.data.stages:
        step = config.first_step(stage)
        changed = config.at(step)
        shares = dataset.train.shares(config.first_position(stage))
        mixture = ", ".join(
            f"{source.name} {100 * share:.4g}%"
            for source, share in zip(dataset.sources, shares, strict=True)
        )
        packing = Packing.of(changed, dataset)
        lines.append(
            f"stage   from update {step:,}: {changed.training.batch_size} x "
            f"{changed.model.max_seq_len}, theta {changed.model.theta:g}"
            + (f", {mixture}" if config.is_mixture else "")
            + (f", room for {packing.n_documents} documents" if packing is not None else "")
        )
    return lines


def describe_validation(dataset: Dataset) -> str:
    """The size of the held-out text, or why there is no validation and how to get one."""
    sets = dataset.validation
    if len(sets) > 1:
        return "held out: " + ", ".join(f"{held.name} {held.stream.n_tokens:,}" for held in sets)
    if sets:
        return f"{sets[0].stream.n_tokens:,} held out"
    too_short = any("validation" in source.manifest.splits for source in dataset.sources)
    what = "less than a sequence" if too_short else "nothing"
    return f"{what} held out: no validation (prepare --validation-fraction)"
