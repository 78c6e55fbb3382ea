"""Activation checkpointing: which activations a block saves, and which its backward recomputes."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from fastllama.config import Config
from fastllama.model.kv_cache import KVCache
from fastllama.model.llama import Block, Llama


def checkpoint_activations(model: Llama, config: Config) -> None:
    """Make the blocks recompute as `training.activation_checkpointing` says.

    Call it before the blocks are compiled and sharded. The compiler then sees what is recomputed,
    and FSDP2 gathers a block once for recomputation and gradients.
    """
    mode = config.training.activation_checkpointing
    if mode == "none":
        return
    options: dict[str, Any] = {
        "use_reentrant": False,
        # Nothing is random without dropout, and saving the generators' states takes time.
        "preserve_rng_state": config.model.dropout > 0,
    }
    policy: Callable[..., CheckpointPolicy] | None = None
    if mode == "selective":
        policy = partial(
            save_expensive_ops, recomputed_widths(config), bool(config.training.compile)
        )
    elif config.training.compile:
        policy = save_nothing
    if policy is not None:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
    for block in model.blocks:
        block.__class__ = CheckpointedBlock
        cast(CheckpointedBlock, block).checkpoint_options = options


class CheckpointedBlock(Block):
    """A block that recomputes activations in its backward.

    Module hooks, FSDP2's among them, run outside of `forward` and so outside of the recomputation.
    """

    checkpoint_options: dict[str, Any]

    def forward(
        self,
        x_BTD: Tensor,
        stream_BTD: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        cache: KVCache | None = None,
        last_only: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run both branches, as `Block.forward` does."""
        outputs: tuple[Tensor, Tensor] = checkpoint(
            super().forward,
            x_BTD,
            stream_BTD,
            rotary,
            cache,
            last_only,
            cu_seqlens,
            **self.checkpoint_options,
        )
        return outputs


def save_nothing(*operation: Any, **options: Any) -> CheckpointPolicy:
    """Recompute everything.

    The compiler of PyTorch 2.11 needs to be told. Without a policy it saves what autograd Functions
    save for backward, which is nearly all of a block of fused operators.
    """
    return CheckpointPolicy.MUST_RECOMPUTE


def recomputed_widths(config: Config) -> frozenset[int]:
    """Widths of the projections that "selective" recomputes: gate_up, and compiled also qkv.

    Compiled, the rotated qkv is saved and not the projection before it: the compiler removes
    mutations before it decides what to save, and would copy a projection that is saved and then
    rotated in place. In eager mode the block runs again without the saved operators, so it would
    multiply for a projection whose rotation is saved.
    """
    model = config.model
    widths = {2 * model.ffn_width}
    if config.training.compile:
        widths.add((model.n_heads + 2 * model.kv_heads) * model.head_width)
    return frozenset(widths)


MATMULS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)


def save_expensive_ops(
    recomputed: frozenset[int],
    saves_rope: bool,
    context: Any,
    operator: Any,
    *arguments: Any,
    **options: Any,
) -> CheckpointPolicy:
    """Save attention, matmuls unless their width is in `recomputed`, and perhaps rope.

    The cost of recomputing a result, in FLOPs for each byte of bfloat16 that saving it takes:

    | result                         | FLOPs a byte | at the 1B shape |
    |--------------------------------|--------------|-----------------|
    | mlp.down                       | F            | 5,632           |
    | attention, causal              | T            | 2,048           |
    | qkv, attention.output, gate_up | D            | 2,048           |
    | norms, rope, swiglu            | about 10     |                 |

    Elementwise operators, `torch.ops.fastllama.*` among them, are therefore recomputed. The fused
    operators save no elementwise result anyway. A block that saved every matmul would hold more
    than one without checkpointing: one residual stream less, but the outputs of two projections
    more. So one matmul is recomputed. gate_up costs no more than others, and its output is half of
    all bytes: 28,800 of 47,232 bytes a token remain, for 15 % more matmul FLOPs in the blocks.
    Saving the output of mlp.down is free: it is the input of the next block.
    """
    name = operator.name()
    if operator in MATMULS:
        keep = arguments[-1].shape[-1] not in recomputed
    else:
        keep = "attention" in name or "attn" in name or (saves_rope and "rope" in name)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
