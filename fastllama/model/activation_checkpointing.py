"""Activation checkpointing: what a block computes again in its backward instead of keeping it."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from fastllama.config import Config
from fastllama.model.llama import Block, Llama


def checkpoint_activations(model: Llama, config: Config) -> None:
    """Make the blocks recompute as `training.activation_checkpointing` says.

    To be called before the blocks are compiled and sharded: the compiler then sees what is
    recomputed, and a block is gathered once for recomputation and gradients.
    """
    mode = config.training.activation_checkpointing
    if mode == "none":
        return
    options: dict[str, Any] = {
        "use_reentrant": False,
        # Nothing is random without dropout, and reading the generators' states takes time.
        "preserve_rng_state": config.model.dropout > 0,
    }
    policy: Callable[..., CheckpointPolicy] | None = None
    if mode == "selective":
        policy = partial(keep_what_is_dear, 2 * config.model.ffn_hidden)
    elif config.training.compile:
        policy = keep_nothing
    if policy is not None:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
    run = partial(checkpoint, **options)
    for block in model.blocks:
        cast(Block, block).checkpoint = run


def keep_nothing(*operation: Any, **options: Any) -> CheckpointPolicy:
    """Compute everything again.

    For the compiler of PyTorch 2.11, which without a policy keeps what autograd Functions hold for
    their backwards: of a block of fused operators nearly all.
    """
    return CheckpointPolicy.MUST_RECOMPUTE


PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)


def keep_what_is_dear(
    gate_up_width: int, context: Any, operator: Any, *arguments: Any, **options: Any
) -> CheckpointPolicy:
    """Keep attention and the products but that of gate and up; compute the rest again.

    What an operator's result costs to compute again, in FLOPs for each byte of bfloat16 kept:

    | result                         | FLOPs a byte | at the 1B shape |
    |--------------------------------|--------------|-----------------|
    | mlp.down                       | F            | 5,632           |
    | attention, causal              | T            | 2,048           |
    | qkv, attention.output, gate_up | D            | 2,048           |
    | norms, rope, swiglu            | about 10     |                 |

    So the elementwise operators, `torch.ops.fastllama.*` among them, are always recomputed. But
    the fused operators keep no elementwise result anyway, and a block that kept every product
    would hold more than without checkpointing: one residual stream less, the outputs of two
    projections more. One product has to go, and gate_up, no dearer than others, is half of all
    bytes: 28,800 a token stay of 47,240, for 15 % more FLOPs in the blocks' products. The result
    of mlp.down costs nothing to keep: it is the input of the next block.
    """
    name = operator.name()
    if operator in PRODUCTS:
        is_gate_up = arguments[-1].shape[-1] == gate_up_width
        return CheckpointPolicy.PREFER_RECOMPUTE if is_gate_up else CheckpointPolicy.MUST_SAVE
    is_attention = "attention" in name or "attn" in name
    return CheckpointPolicy.MUST_SAVE if is_attention else CheckpointPolicy.PREFER_RECOMPUTE
