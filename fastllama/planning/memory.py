"""Plans the memory of each device and the traffic between devices, from the options alone.

All numbers are bytes, for the fused operators and float32 AdamW. The docstrings use these symbols;
D, E, H, I and K are as in fastllama/model/llama.py:

    n_all    parameters of the model     b  bytes of an element of `training.dtype`
    s        ranks of one replica        r  bytes of an element of `parallel.reduce_dtype`
"""

import itertools
from dataclasses import asdict, dataclass, replace
from typing import Literal

from fastllama.config import Config
from fastllama.planning.flops import n_block_parameters, n_parameters
from fastllama_kernels.linear_cross_entropy import chunk_length

# Memory is planned for GPUs, where auto is bfloat16.
_BYTES = {"float32": 4, "bfloat16": 2, "auto": 2}

# Of Hopper and newer; PyTorch allocates it with the first matmul.
_CUBLAS_WORKSPACE = 32 * 2**20

# The rest is for allocator fragmentation, NCCL and the CUDA context, which the plan leaves out.
_USABLE = 0.9


@dataclass(frozen=True)
class MemoryPlan:
    """Peak bytes of one device. The peak is at the start of the backward."""

    parameters: int
    """Float32 shards."""
    optimizer: int
    """Two AdamW moments, sharded like the parameters."""
    ema: int
    """Average of the weights with `training.ema_decay`, sharded like the parameters."""
    gradients: int
    """Sums over the earlier micro-batches; 0 with one micro-batch per update."""
    gathered: int
    """Parameters gathered for the computation: all, or with resharding some, as in
    `_gathered_bytes`."""
    activations: int
    """Tensors that the blocks save for backward."""
    backward: int
    """Buffers of the loss or of a block's backward, whichever need more together with `gathered`,
    and the workspace of cuBLAS."""

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return (
            self.parameters
            + self.optimizer
            + self.ema
            + self.gradients
            + self.gathered
            + self.activations
            + self.backward
        )


@dataclass(frozen=True)
class TrafficPlan:
    """Bytes that one device sends in one update, with ring collectives."""

    all_gather: int
    reduce_scatter: int
    all_reduce: int


def plan_memory(config: Config, world_size: int) -> MemoryPlan:
    """Plan the memory of each of `world_size` devices.

    |             | bytes                                                         |
    |-------------|---------------------------------------------------------------|
    | parameters  | 4 n_all / s                                                   |
    | optimizer   | 8 n_all / s                                                   |
    | ema         | with `training.ema_decay`: 4 n_all / s                        |
    | gradients   | if micro-batches accumulate: r n_all; sharded 4 n_all / s, or |
    |             | r n_all / s with replicas                                     |
    | gathered    | b n_all; resharded `_gathered_bytes`                          |
    | activations | `activation_bytes` per layer and token                        |
    | backward    | `_loss_bytes` or `_block_bytes`, and 32 MiB                   |

    Gathered and backward are those of the loss or of a block, whose sum is larger. "auto" of
    `parallel.reshard_after_forward` and `parallel.accumulate` counts as False and "unsharded";
    `choose_by_memory` decides them.
    """
    model, training, parallel = config.model, config.training, config.parallel
    n_all = n_parameters(model)
    n_shard = n_all // (world_size // parallel.replicate)
    n_tokens = training.batch_size * model.max_seq_len
    gathered, backward = max(
        (_gathered_bytes(config, in_block=False), _loss_bytes(config, world_size)),
        (_gathered_bytes(config, in_block=True), _block_bytes(config, world_size)),
        key=sum,
    )
    return MemoryPlan(
        parameters=4 * n_shard,
        optimizer=8 * n_shard,
        ema=4 * n_shard if training.ema_decay else 0,
        gradients=_gradient_bytes(config, world_size, n_all, n_shard),
        gathered=gathered,
        activations=n_tokens
        * model.n_layers
        * activation_bytes(config, training.activation_checkpointing),
        backward=backward + _CUBLAS_WORKSPACE,
    )


def _gathered_bytes(config: Config, in_block: bool) -> int:
    """Bytes of parameters gathered while the loss runs, or the backward of a block.

    Resharded, the loss has the parameters outside of blocks and the last block. FSDP2 still has the
    buffer of the last all-gather, which is that of an output projection that is not tied. In the
    backward of a block the one before it is gathered too, and such an output projection is free.
    """
    model, compute = config.model, _BYTES[config.training.dtype]
    n_gathered, n_block = n_parameters(model), n_block_parameters(model)
    if config.parallel.reshard_after_forward is True:
        n_blocks = min(2 if in_block else 1, model.n_layers)
        n_gathered -= (model.n_layers - n_blocks) * n_block
        if not model.tied_embeddings:
            n_output = model.vocab_size * model.n_embd
            n_gathered += -n_output if in_block else n_output
    return compute * n_gathered


def _gradient_bytes(config: Config, world_size: int, n_all: int, n_shard: int) -> int:
    parallel = config.parallel
    reduce = _BYTES[parallel.reduce_dtype]
    if config.accumulation_steps(world_size) == 1:
        return 0
    if parallel.accumulate != "sharded":
        return reduce * n_all
    # FSDP2 sums shards as gradients of the float32 parameters, but before the reduction over
    # replicas as results of the reduce-scatter.
    return (4 if parallel.replicate == 1 else reduce) * n_shard


def activation_bytes(config: Config, checkpointing: str) -> int:
    """Bytes per token that one block saves for backward, by mode of activation checkpointing.

    |                  | none        | selective   | full  |
    |------------------|-------------|-------------|-------|
    | residual stream  | 2 D b       | 2 D b       | 2 D b |
    | qkv              | E b         | E b         |       |
    | attention, lse   | H K b + 4 H | H K b + 4 H |       |
    | attention.output |             | D b         |       |
    | gate_up          | I b         |             |       |
    | dropout masks    | 2 D         |             |       |

    `training.save_projection_inputs` adds (2 D + F) b.
    """
    model, compute = config.model, _BYTES[config.training.dtype]
    saved = 2 * model.n_embd * compute
    if checkpointing == "full":
        return saved
    qkv_width = (model.n_heads + 2 * model.kv_heads) * model.head_width
    saved += (qkv_width + model.attention_width) * compute + 4 * model.n_heads
    if checkpointing == "selective":
        return saved + model.n_embd * compute
    if config.training.save_projection_inputs:
        saved += (2 * model.n_embd + model.ffn_width) * compute
    masks = 2 * model.n_embd if model.dropout else 0
    return saved + 2 * model.ffn_width * compute + masks


def can_sum_in_matmuls(config: Config, world_size: int) -> bool:
    """Whether the options let matmuls add weight gradients to float32 sums over micro-batches.

    "auto" of `parallel.accumulate` counts as "unsharded".
    """
    parallel = config.parallel
    return (
        config.accumulation_steps(world_size) > 1
        and parallel.accumulate != "sharded"
        and parallel.reduce_dtype == "float32"
    )


def _loss_bytes(config: Config, world_size: int) -> int:
    """Bytes of the loss.

    Input of the output projection, its gradient, and the gradient of the projection in float32.
    Also one chunk of logits, in the forward, or the scaled gradients, in the backward; sums in
    matmuls take that of the projection as it is.
    """
    model, compute = config.model, _BYTES[config.training.dtype]
    n_tokens = config.training.batch_size * model.max_seq_len
    weight, hidden = model.vocab_size * model.n_embd, n_tokens * model.n_embd * compute
    logits = chunk_length(n_tokens, model.vocab_size, compute) * model.vocab_size * compute
    scaled = hidden if can_sum_in_matmuls(config, world_size) else compute * weight + hidden
    return 4 * weight + 2 * hidden + max(logits, scaled)


def _block_bytes(config: Config, world_size: int) -> int:
    """Bytes of the backward of one block.

    Recomputed activations, gradients of activations, and gradients of the output projection in
    reduction and reduced, in the backward of the last block. Where matmuls sum gradients, the
    reduction replaces the sum, and the gathered projection is free by then; resharded,
    `_gathered_bytes` has left it out already. A tied output projection is reduced at the end.
    Unless matmuls sum its gradients, they stay in `training.dtype`, and those of the block as well,
    beside gradients of the previous block in reduction.
    """
    model, training, parallel = config.model, config.training, config.parallel
    compute, reduce = _BYTES[training.dtype], _BYTES[parallel.reduce_dtype]
    n_tokens = training.batch_size * model.max_seq_len
    recomputed = activation_bytes(config, "none") - activation_bytes(
        config, training.activation_checkpointing
    )
    if training.activation_checkpointing != "none" and training.compile is False:
        # In eager mode the block that is run again keeps its input, and has its output as well.
        recomputed += 2 * model.n_embd * compute
    # Gradients of gate_up (2F) and of silu(gate) * up (F), and silu(gate) * up recomputed (F).
    saved = training.save_projection_inputs
    in_flight = (3 if saved else 4) * model.ffn_width * compute
    # Gradients of the residual stream, and of the branch before dropout. Where the inputs of
    # projections are saved, eager blocks need 1 % more than compiled ones; this is between them.
    counts_stream = not saved and training.activation_checkpointing == "none"
    in_flight += (counts_stream + bool(model.dropout)) * model.n_embd * compute
    n_output, n_block = model.vocab_size * model.n_embd, n_block_parameters(model)
    n_shards = world_size // parallel.replicate
    if can_sum_in_matmuls(config, world_size):
        reduced = 0 if model.tied_embeddings else reduce * n_output // n_shards
        freed = 0 if parallel.reshard_after_forward is True else compute * n_output
        gradients = max(0, reduced - freed)
    elif not model.tied_embeddings:
        gradients = n_output * reduce * (n_shards + 1) // n_shards
    else:
        gradients = n_output * compute + n_block * (compute + reduce)
    return gradients + n_tokens * (max(0, recomputed) + in_flight)


def plan_traffic(config: Config, world_size: int) -> TrafficPlan:
    """Plan the traffic of each of `world_size` devices in one update; "auto" as in `plan_memory`.

    In a ring of n ranks, each rank sends (n - 1) / n of the bytes of an all-gather or a
    reduce-scatter, and twice as many for an all-reduce. An update gathers all parameters once.
    Resharded, each micro-batch gathers every block twice, except the last block and the parameters
    outside of blocks, which it gathers once. Gradients are reduced once per update. Sharded, they
    are reduce-scattered once per micro-batch.
    """
    model, parallel = config.model, config.parallel
    n_all, n_block = n_parameters(model), n_block_parameters(model)
    shards = world_size // parallel.replicate
    n_micro_batches = config.accumulation_steps(world_size)
    n_gathered = n_all
    if parallel.reshard_after_forward is True:
        n_gathered = n_micro_batches * (n_all + (model.n_layers - 1) * n_block)
    reduced = _BYTES[parallel.reduce_dtype] * n_all
    n_reductions = n_micro_batches if parallel.accumulate == "sharded" else 1
    return TrafficPlan(
        all_gather=_BYTES[config.training.dtype] * n_gathered * (shards - 1) // shards,
        reduce_scatter=n_reductions * reduced * (shards - 1) // shards,
        all_reduce=2 * reduced // shards * (parallel.replicate - 1) // parallel.replicate,
    )


def choose_by_memory(config: Config, world_size: int, available: int | None) -> tuple[Config, str]:
    """Decide `parallel.reshard_after_forward` and `parallel.accumulate`; also return the reason.

    An option that is not "auto" stays. `available` is the memory of one device in bytes, or None
    on a CPU, where memory is not the limit.

    The first choice that fits is taken, in the order of traffic: keep all; sum gradients in shards;
    free parameters; both. With A micro-batches per update, sums in shards send about A - 1 bytes
    for each byte they save, because every micro-batch reduces what one would. Freed parameters send
    about 2 A - 1, because every micro-batch gathers twice what an update gathers once.

    Where none fits, the smallest is taken if the whole memory holds it. The plan is that of the
    stage that needs most.

    Raises:
        ValueError: the smallest plan is larger than the memory; the sentence has the remedies.
    """
    stage, reason = _choose_in_stage(largest_stage(config, world_size), world_size, available)
    return replace(config, parallel=stage.parallel), reason


def refuse_small_host(config: Config, world_size: int, n_here: int, memory: int) -> None:
    """Refuse a model whose training state does not fit on a machine without GPUs.

    What an operator needs on a CPU beyond that is not planned.

    Args:
        config: the run.
        world_size: processes of the run.
        n_here: processes on this machine.
        memory: bytes of this machine.

    Raises:
        ValueError: weights, moments and average of its processes are larger than `memory`.
    """
    plan = plan_memory(possible_choices(config, world_size)[0], world_size)
    state = n_here * (plan.parameters + plan.optimizer + plan.ema)
    if state > memory:
        raise ValueError(
            f"On CPUs, the weights and AdamW's moments alone need {_gibibytes(state)} GiB here, "
            f"and the machine has {_gibibytes(memory)} GiB; train on GPUs or more machines, or "
            "train a smaller model."
        )


def largest_stage(config: Config, world_size: int) -> Config:
    """The stage of a run that needs most memory."""
    return max(config.stages, key=lambda stage: plan_memory(stage, world_size).total)


def _choose_in_stage(config: Config, world_size: int, available: int | None) -> tuple[Config, str]:
    choices = possible_choices(config, world_size)
    totals = [plan_memory(choice, world_size).total for choice in choices]
    described = [describe_choice(choice, world_size) for choice in choices]
    if available is None:
        return choices[0], f"{described[0]}: {_gibibytes(totals[0])} GiB, not limited on a CPU"
    smallest = totals.index(min(totals))
    if totals[smallest] > available:
        raise ValueError(_too_large(config, choices[smallest], world_size, available))
    usable = _USABLE * available
    chosen = next((i for i, total in enumerate(totals) if total <= usable), smallest)
    reason = f"{described[chosen]}: {_gibibytes(totals[chosen])} of {_gibibytes(available)} GiB"
    if totals[chosen] > usable:
        reason += f", more than the {_USABLE * 100:.0f} % that a run can rely on"
    for i in range(chosen):
        reason += f"; {_gibibytes(totals[i])} with {described[i]}"
    return choices[chosen], reason


def possible_choices(config: Config, world_size: int) -> list[Config]:
    """What the options leave open, without "auto", least traffic first."""
    parallel = config.parallel
    reshard, accumulate = parallel.reshard_after_forward, parallel.accumulate
    return [
        replace(config, parallel=replace(parallel, reshard_after_forward=freed, accumulate=sums))
        for freed, sums in itertools.product(
            (False, True) if reshard == "auto" else (reshard,),
            _possible_sums(config, world_size) if accumulate == "auto" else (accumulate,),
        )
    ]


def _possible_sums(config: Config, world_size: int) -> tuple[Literal["unsharded", "sharded"], ...]:
    """Values of `parallel.accumulate` that differ: there must be several sums, and shards."""
    if config.accumulation_steps(world_size) == 1 or world_size == config.parallel.replicate:
        return ("unsharded",)
    return "unsharded", "sharded"


def describe_choice(config: Config, world_size: int) -> str:
    """What a config without "auto" does with gathered parameters and with sums of gradients."""
    freed = config.parallel.reshard_after_forward
    described = f"parameters {'freed after the forward' if freed else 'kept for the backward'}"
    if config.accumulation_steps(world_size) > 1:
        in_shards = config.parallel.accumulate == "sharded"
        described += f", gradients summed {'in shards' if in_shards else 'whole'}"
    return described


def _too_large(config: Config, smallest: Config, world_size: int, available: int) -> str:
    """A sentence with the sum of the smallest plan, its largest parts, and the remedies."""
    plan = plan_memory(smallest, world_size)
    parts = sorted(asdict(plan).items(), key=lambda part: -part[1])[:3]
    training, parallel = config.training, config.parallel
    remedies = ["use more devices"]
    if training.batch_size > 1:
        option = (
            "the batch_size of the largest stage,"
            if config.data.stages
            else "training.batch_size ="
        )
        remedies.append(f"lower {option} {training.batch_size}")
    if training.activation_checkpointing != "full":
        remedies.append(
            f'set training.activation_checkpointing = "full" instead of '
            f'"{training.activation_checkpointing}"'
        )
    if parallel.reshard_after_forward is False:
        remedies.append('set parallel.reshard_after_forward = "auto" instead of false')
    if parallel.accumulate == "unsharded" and len(_possible_sums(config, world_size)) > 1:
        remedies.append('set parallel.accumulate = "auto" instead of "unsharded"')
    return (
        f"The smallest plan needs {_gibibytes(plan.total)} GiB, and the device has "
        f"{_gibibytes(available)} GiB ("
        + ", ".join(f"{name} {_gibibytes(size)}" for name, size in parts)
        + f"); {', or '.join(remedies)}."
    )


def _gibibytes(count: int) -> str:
    return f"{count / 2**30:,.1f}"
