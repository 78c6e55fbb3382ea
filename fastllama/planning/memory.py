"""Plans the memory of each device and the traffic between devices, from the options alone.

All numbers are bytes, for the fused operators and float32 AdamW. The docstrings use these symbols;
D, E, H and I are as in fastllama/model/llama.py:

    n_all    parameters of the model     b  bytes of an element of `training.dtype`
    n_block  parameters of one block     r  bytes of an element of `parallel.reduce_dtype`
    n_rest   parameters outside blocks   s  ranks of one replica
"""

from dataclasses import dataclass

from fastllama.config import Config
from fastllama.planning.flops import n_block_parameters, n_parameters

_BYTES = {"float32": 4, "bfloat16": 2}

# The rest is for allocator fragmentation, NCCL and the CUDA context, which the plan leaves out.
_USABLE = 0.9


@dataclass(frozen=True)
class MemoryPlan:
    """Peak bytes of one device. The peak is at the start of the backward."""

    parameters: int
    """Float32 shards."""
    optimizer: int
    """Two AdamW moments, sharded like the parameters."""
    gradients: int
    """Unsharded sums over the earlier micro-batches; 0 with one micro-batch per update."""
    gathered: int
    """Parameters gathered for the computation: all, or with resharding those of two blocks and
    those outside of blocks."""
    activations: int
    """Tensors that the blocks save for backward."""
    backward: int
    """Buffers of the loss or of the first block in the backward, whichever are larger."""

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return (
            self.parameters
            + self.optimizer
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


def plan_memory(config: Config, world_size: int, *, reshard: bool) -> MemoryPlan:
    """Plan the memory of each of `world_size` devices.

    `reshard` frees gathered parameters after the forward.

    |             | bytes                                                   |
    |-------------|---------------------------------------------------------|
    | parameters  | 4 n_all / s                                             |
    | optimizer   | 8 n_all / s                                             |
    | gradients   | r n_all if micro-batches accumulate                     |
    | gathered    | b n_all, or with `reshard` b (n_rest + 2 n_block)       |
    | activations | `activation_bytes` per layer and token                  |
    | backward    | the larger of `_loss_bytes` and `_block_bytes`          |
    """
    model, training = config.model, config.training
    compute, n_all, n_block = _BYTES[training.dtype], n_parameters(model), n_block_parameters(model)
    n_shard = n_all // (world_size // config.parallel.replicate)
    n_gathered = n_all - max(0, model.n_layers - 2) * n_block if reshard else n_all
    accumulates = config.accumulation_steps(world_size) > 1
    n_tokens = training.batch_size * model.max_seq_len
    return MemoryPlan(
        parameters=4 * n_shard,
        optimizer=8 * n_shard,
        gradients=_BYTES[config.parallel.reduce_dtype] * n_all if accumulates else 0,
        gathered=compute * n_gathered,
        activations=n_tokens
        * model.n_layers
        * activation_bytes(config, training.activation_checkpointing),
        backward=max(_loss_bytes(config), _block_bytes(config)),
    )


def activation_bytes(config: Config, checkpointing: str) -> int:
    """Bytes per token that one block saves for backward, by mode of activation checkpointing.

    |                  | none      | selective | full  |
    |------------------|-----------|-----------|-------|
    | residual stream  | 2 D b     | 2 D b     | 2 D b |
    | qkv              | E b       | E b       |       |
    | attention, lse   | D b + 4 H | D b + 4 H |       |
    | attention.output |           | D b       |       |
    | gate_up          | I b       |           |       |
    | rstd             | 8         |           |       |
    """
    model, compute = config.model, _BYTES[config.training.dtype]
    saved = 2 * model.n_embd * compute
    if checkpointing == "full":
        return saved
    qkv_width = (model.n_heads + 2 * model.kv_heads) * model.head_dim
    saved += (qkv_width + model.n_embd) * compute + 4 * model.n_heads
    if checkpointing == "selective":
        return saved + model.n_embd * compute
    return saved + 2 * model.ffn_hidden * compute + 8


def _loss_bytes(config: Config) -> int:
    """Bytes of the loss's gradients.

    Gradient of the output projection in float32 and in `training.dtype`, and gradient of its input
    before and after scaling.
    """
    model, compute = config.model, _BYTES[config.training.dtype]
    n_tokens = config.training.batch_size * model.max_seq_len
    weight = model.vocab_size * model.n_embd
    return weight * (4 + compute) + 2 * n_tokens * model.n_embd * compute


def _block_bytes(config: Config) -> int:
    """Bytes of the backward of one block.

    Gradients of the output projection and the block in `training.dtype`, gradients of the previous
    block in reduction, recomputed activations, and gradients of activations.
    """
    model, training = config.model, config.training
    compute, reduce = _BYTES[training.dtype], _BYTES[config.parallel.reduce_dtype]
    n_tokens = training.batch_size * model.max_seq_len
    recomputed = activation_bytes(config, "none") - activation_bytes(
        config, training.activation_checkpointing
    )
    # Gradients of gate_up (2F) and of silu(gate) * up (F), and silu(gate) * up recomputed (F).
    in_flight = 4 * model.ffn_hidden * compute
    return (
        model.vocab_size * model.n_embd * compute
        + n_block_parameters(model) * (compute + reduce)
        + n_tokens * (max(0, recomputed) + in_flight)
    )


def plan_traffic(config: Config, world_size: int, *, reshard: bool) -> TrafficPlan:
    """Plan the traffic of each of `world_size` devices in one update.

    In a ring of n ranks, each rank sends (n - 1) / n of the bytes of an all-gather or a
    reduce-scatter, and twice as many for an all-reduce. Without `reshard`, an update gathers all
    parameters once. With `reshard`, each micro-batch gathers every block twice, except the last
    block and the parameters outside of blocks, which it gathers once.
    """
    model, parallel = config.model, config.parallel
    n_all, n_block = n_parameters(model), n_block_parameters(model)
    shards = world_size // parallel.replicate
    n_gathered = n_all
    if reshard:
        n_gathered = n_all + (model.n_layers - 1) * n_block
        n_gathered *= config.accumulation_steps(world_size)
    reduced = _BYTES[parallel.reduce_dtype] * n_all
    return TrafficPlan(
        all_gather=_BYTES[config.training.dtype] * n_gathered * (shards - 1) // shards,
        reduce_scatter=reduced * (shards - 1) // shards,
        all_reduce=2 * reduced // shards * (parallel.replicate - 1) // parallel.replicate,
    )


def choose_resharding(config: Config, world_size: int, available: int | None) -> tuple[bool, str]:
    """Decide whether to free gathered parameters after the forward; also return the reason.

    `parallel.reshard_after_forward` decides unless it is "auto". `available` is the memory of one
    device in bytes, or None on a CPU, where memory is not the limit.
    """
    choice = config.parallel.reshard_after_forward
    if choice != "auto":
        return choice, f"parameters {_action(choice)}, as asked for"
    if available is None:
        return False, f"parameters {_action(False)}, as always on a CPU"
    kept = plan_memory(config, world_size, reshard=False).total
    reshard = kept > _USABLE * available
    reason = f"keeping them needs {_gibibytes(kept)} of {_gibibytes(available)} GiB"
    if reshard:
        freed = plan_memory(config, world_size, reshard=True).total
        reason += f", freeing them {_gibibytes(freed)} GiB"
    return reshard, f"parameters {_action(reshard)}: {reason}"


def _action(reshard: bool) -> str:
    return "freed after the forward" if reshard else "kept for the backward"


def _gibibytes(count: int) -> str:
    return f"{count / 2**30:.1f}"
