"""FSDP2: the model sharded over the processes; one process is the same case."""

import dataclasses
from functools import partial
from itertools import pairwise
from typing import cast

import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from fastllama.config import Config
from fastllama.distributed.world import World
from fastllama.model.llama import Llama
from fastllama.planning.memory import choose_resharding


def resolve_resharding(config: Config, world: World) -> tuple[Config, str]:
    """`config` with "auto" of `parallel.reshard_after_forward` decided, and what was and why."""
    available = None
    if world.device.type == "cuda":
        available = torch.cuda.get_device_properties(world.device).total_memory
    reshard, reason = world.from_main(lambda: choose_resharding(config, world.size, available))
    parallel = dataclasses.replace(config.parallel, reshard_after_forward=reshard)
    return dataclasses.replace(config, parallel=parallel), reason


def shard_model(model: Llama, config: Config, world: World) -> None:
    """Shard a meta-device model block by block and allocate this process's part.

    Parameters are float32 shards; they are gathered and computed with in `training.dtype`, and
    gradients are reduced in `parallel.reduce_dtype`. `cast_forward_inputs` is off because the
    rotary tables go through the blocks' inputs and must stay float32. Whether to reshard has to be
    decided by now (`resolve_resharding`).
    """
    policy = MixedPrecisionPolicy(
        param_dtype=getattr(torch, config.training.dtype),
        reduce_dtype=getattr(torch, config.parallel.reduce_dtype),
        cast_forward_inputs=False,
    )
    shard = partial(fully_shard, mesh=world.mesh, mp_policy=policy)
    reshard = config.parallel.reshard_after_forward
    assert reshard != "auto"
    for block in model.blocks:
        # The backward begins with the last block: what it would free it would gather again at once.
        shard(block, reshard_after_forward=reshard and block is not model.blocks[-1])
    # The same holds for the root's own weights, embedding and output.
    shard(model, reshard_after_forward=False)
    _prefetch_one_ahead(model)
    model.to_empty(device=world.device)


def _prefetch_one_ahead(model: Llama) -> None:
    """Gather each block while the one before it computes, in both directions.

    It is the order PyTorch would find by itself, but asked for from the host before the block
    under way is launched and not after, so that a slow host delays no gather. Blocks that are
    gathered already are passed over.
    """
    order = [cast(FSDPModule, module) for module in (model, *model.blocks)]
    for module, following in pairwise(order):
        module.set_modules_to_forward_prefetch([following])
    for module, following in pairwise([order[0], *reversed(order[1:])]):
        module.set_modules_to_backward_prefetch([following])


def reshard(model: Llama) -> None:
    """Give up gathered parameters after forwards that no backward follows.

    Until then the model's parameters are not the shards the optimizer and checkpoints work on.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def set_last_micro_batch(model: FSDPModule, is_last: bool, reshard: bool) -> None:
    """Reduce gradients after the last micro-batch of an update only.

    Until then they accumulate on this device, in `parallel.reduce_dtype`, and unless `reshard`
    saves memory the gathered parameters stay too, so an update communicates once however many
    micro-batches it has: within a replica and, where there are several, between them.
    """
    model.set_requires_gradient_sync(is_last)
    model.set_is_last_backward(is_last)
    model.set_reshard_after_backward(is_last or reshard)
