"""What a run needs of each device and of the network between them, from its options alone.

For the fused operators and float32 AdamW; in bytes. N parameters, P in a block and R outside of
the blocks, D, E, F, H, V as in fastllama/model.py, T tokens in a micro-batch of one device, s
processes in a replica, b and r bytes of `training.dtype` and `parallel.reduce_dtype`.
"""

from dataclasses import dataclass

from fastllama.config import Config
from fastllama.planning.flops import n_block_parameters, n_parameters

_BYTES = {"float32": 4, "bfloat16": 2}

# What fragments of the allocator, NCCL and the CUDA context take is not planned.
_USABLE = 0.9


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes one device holds when it holds the most: as the backward of an update begins."""

    parameters: int
    """Shards in float32."""
    optimizer: int
    """AdamW's two moments, as the parameters."""
    gradients: int
    """Whole, as summed over the micro-batches before; nothing before the first backward."""
    gathered: int
    """Parameters put together to compute with: all of them, or a block and the next."""
    activations: int
    """What the blocks keep for their backward."""
    backward: int
    """Buffers of the loss or, where that is more, of the first block to go back through."""

    @property
    def total(self) -> int:
        """All of them at once."""
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
    """Bytes a device sends in one update, by collectives that pass them around a ring."""

    all_gather: int
    reduce_scatter: int
    all_reduce: int


def plan_memory(config: Config, world_size: int, *, reshard: bool) -> MemoryPlan:
    """The memory of each of `world_size` devices, gathered parameters freed by `reshard` or kept.

    |             | bytes                                                    |
    |-------------|----------------------------------------------------------|
    | parameters  | 4 N / s                                                  |
    | optimizer   | 8 N / s                                                  |
    | gradients   | r N where micro-batches accumulate                       |
    | gathered    | b N, or with `reshard` b (R + 2 P)                       |
    | activations | a layer and token: `activation_bytes`                    |
    | backward    | `_loss_bytes` or `_block_bytes`                          |
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
    """Bytes a block keeps for its backward of each token.

    |             | none      | selective | full |
    |-------------|-----------|-----------|------|
    | stream      | 2 D b     | 2 D b     | 2 D b |
    | qkv         | E b       | E b       |      |
    | attention   | D b + 4 H | D b + 4 H |      |
    | projected   |           | D b       |      |
    | gate and up | 2 F b     |           |      |
    | rstd        | 8         |           |      |
    """
    model, compute = config.model, _BYTES[config.training.dtype]
    kept = 2 * model.n_embd * compute
    if checkpointing == "full":
        return kept
    qkv_width = (model.n_heads + 2 * model.kv_heads) * model.head_dim
    kept += (qkv_width + model.n_embd) * compute + 4 * model.n_heads
    if checkpointing == "selective":
        return kept + model.n_embd * compute
    return kept + 2 * model.ffn_hidden * compute + 8


def _loss_bytes(config: Config) -> int:
    """Gradients of the output projection and of its input, as computed and as scaled."""
    model, compute = config.model, _BYTES[config.training.dtype]
    n_tokens = config.training.batch_size * model.max_seq_len
    weight = model.vocab_size * model.n_embd
    return weight * (4 + compute) + 2 * n_tokens * model.n_embd * compute


def _block_bytes(config: Config) -> int:
    """Gradients of the output projection, of one block and of its activations.

    The block's are in `training.dtype`, and in the reduction those of the one before; recomputed
    activations are in addition to those kept.
    """
    model, training = config.model, config.training
    compute, reduce = _BYTES[training.dtype], _BYTES[config.parallel.reduce_dtype]
    n_tokens = training.batch_size * model.max_seq_len
    recomputed = activation_bytes(config, "none") - activation_bytes(
        config, training.activation_checkpointing
    )
    # Of gate_up, of silu(gate) * up, and that itself again.
    in_flight = 4 * model.ffn_hidden * compute
    return (
        model.vocab_size * model.n_embd * compute
        + n_block_parameters(model) * (compute + reduce)
        + n_tokens * (max(0, recomputed) + in_flight)
    )


def plan_traffic(config: Config, world_size: int, *, reshard: bool) -> TrafficPlan:
    """What each of `world_size` devices sends in an update.

    A ring of n sends (n - 1) / n of what it gathers or scatters, and twice that of what it
    reduces for all. Without `reshard` all parameters are gathered once an update; with it a
    micro-batch gathers every block twice, the last one and what is outside of the blocks once.
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
    """Whether to free gathered parameters after the forward, and why.

    Args:
        config: `parallel.reshard_after_forward` decides unless it is "auto".
        world_size: devices.
        available: bytes of one of them; None where memory is not the limit, on a CPU.
    """
    asked = config.parallel.reshard_after_forward
    if asked != "auto":
        return asked, f"parameters {_fate(asked)}, as asked for"
    if available is None:
        return False, f"parameters {_fate(False)}, as always on a CPU"
    needed = plan_memory(config, world_size, reshard=False).total
    reshard = needed > _USABLE * available
    planned = f"{_gibibytes(needed)} GiB of {_gibibytes(available)} would be needed to keep them"
    if reshard:
        left = plan_memory(config, world_size, reshard=True).total
        planned += f", {_gibibytes(left)} are without"
    return reshard, f"parameters {_fate(reshard)}: {planned}"


def _fate(reshard: bool) -> str:
    return "freed after the forward" if reshard else "kept for the backward"


def _gibibytes(count: int) -> str:
    return f"{count / 2**30:.1f}"
