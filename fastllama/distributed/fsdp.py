"""FSDP2: shards the model over the processes. A single one on a CPU needs no FSDP2."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

from fastllama.config import Config, ParallelConfig
from fastllama.distributed.gloo import uses_gloo
from fastllama.distributed.world import World
from fastllama.model.llama import Linear, Llama
from fastllama.planning.memory import (
    can_sum_in_matmuls,
    choose_by_memory,
    refuse_small_host,
)

AUTOGRAD_SUMS = hasattr(FSDPParam, "unsharded_accumulated_grad")
"""Since PyTorch 2.15, autograd sums whole gradients in `grad` of the gathered parameter.

Before, FSDP2 summed them in `unsharded_accumulated_grad` of its FSDPParam. This is a property now.
"""
_SUM = "main_grad" if AUTOGRAD_SUMS else "unsharded_accumulated_grad"
"""The attribute of an FSDPParam that holds the sum which matmuls add to."""


def resolve_by_memory(config: Config, world: World) -> tuple[Config, str]:
    """Decide "auto" of `parallel.reshard_after_forward` and `parallel.accumulate`.

    Returns:
        The new config, and the choice and its reason in one phrase.

    Raises:
        ValueError: the smallest plan is larger than the memory of the main process's device, or
            on CPUs the weights and their moments are.
    """
    return world.from_main(lambda: choose_on(world.device, config, world.size))


def choose_on(device: torch.device, config: Config, world_size: int) -> tuple[Config, str]:
    """The choice and its reason as `choose_by_memory` makes it on `device`.

    Raises:
        ValueError: as `resolve_by_memory`.
    """
    if device.type == "cuda":
        available = torch.cuda.get_device_properties(device).total_memory
        return choose_by_memory(config, world_size, available)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    n_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    refuse_small_host(config, world_size, n_here, memory)
    return choose_by_memory(config, world_size, None)


def shard_model(model: Llama, config: Config, world: World) -> None:
    """Shard a meta-device model and allocate this process's shards.

    Shards are float32. Parameters are gathered in `training.dtype`, gradients are reduced in
    `parallel.reduce_dtype`. `cast_forward_inputs` is off because the rotary tables are inputs of
    the blocks and must stay float32. Call `resolve_by_memory` first.

    A single process on a CPU gets the whole model: FSDP2 would copy weights and gradients for
    nothing. Several on CPUs share it as one group, unless parameters are freed after the forward.
    """
    if world.size == 1 and world.device.type == "cpu":
        model.to_empty(device=world.device)
        model.tie_weights()
        return
    policy = MixedPrecisionPolicy(
        param_dtype=getattr(torch, config.training.dtype),
        reduce_dtype=getattr(torch, config.parallel.reduce_dtype),
        cast_forward_inputs=False,
    )
    shard = partial(fully_shard, mesh=world.mesh, mp_policy=policy)
    reshard = config.parallel.reshard_after_forward
    assert reshard != "auto"
    if uses_gloo() and not reshard:
        # Gloo blocks the host, so no collective overlaps with computation: blocks in groups of
        # their own would free nothing, and would only split the graph of torch.compile.
        shard(model, reshard_after_forward=False)
    else:
        _shard_by_block(model, shard, reshard)
    if world.size > 1:
        world.collectives.install(model)
    model.to_empty(device=world.device)


def _shard_by_block(model: Llama, shard: Callable[..., object], reshard: bool) -> None:
    """Make each block a group, so that its collectives overlap with the computation of others."""
    for block in model.blocks:
        # The backward begins with the last block: if freed, it would be gathered again at once.
        shard(block, reshard_after_forward=reshard and block is not model.blocks[-1])
    if not model.config.tied_embeddings:
        # The gradient of the output projection is ready first and that of the embedding last. In
        # groups of their own, all but the embedding's reduction overlaps with the backward.
        shard(model.embedding, reshard_after_forward=False)
        shard([model.norm, model.output], reshard_after_forward=False)
    # Tied, the rest are embedding and norm; otherwise nothing is left.
    shard(model, reshard_after_forward=False)
    _prefetch_one_ahead(model)


def _prefetch_one_ahead(model: Llama) -> None:
    """Gather each block while the block before it computes, in forward and backward.

    The order is that of FSDP2's implicit prefetch, but each gather is issued before the current
    block's kernels are launched, so a slow host delays no gather. FSDP2 skips blocks that are
    already gathered.
    """
    if model.config.tied_embeddings:
        forward = [model, *model.blocks]
        backward = [model, *reversed(model.blocks)]
    else:
        forward = [model.embedding, *model.blocks, model.output]
        # The last prefetches itself, which is nothing. Without that FSDP2 would prefetch what it
        # has recorded before: the output projection of an earlier micro-batch.
        backward = [*reversed(forward), model.embedding]
    for module, following in pairwise(cast(list[FSDPModule], forward)):
        module.set_modules_to_forward_prefetch([following])
    for module, following in pairwise(cast(list[FSDPModule], backward)):
        module.set_modules_to_backward_prefetch([following])


def reshard(model: Llama) -> None:
    """Free gathered parameters after a forward without a backward.

    Afterwards the model's parameters are again the shards that optimizer and checkpoints use.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _linear_weights(model: nn.Module) -> Iterator[FSDPParam]:
    """What FSDP2 knows of each weight that a matmul multiplies and that is trained."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            group = module._get_fsdp_state()._fsdp_param_group
            for weight in () if group is None else group.fsdp_params:
                if _owners(weight) and weight.sharded_param.requires_grad:
                    yield weight


def _owners(weight: FSDPParam) -> list[Linear]:
    """The projections with this weight: one, or none for a norm or an untied embedding."""
    info = weight._module_info
    return [module for module in (info.module, *info.shared_modules) if isinstance(module, Linear)]


def sums_in_matmuls(config: Config, world: World) -> bool:
    """Whether to call `sum_in_matmuls` before each update.

    On a CPU it gains nothing: float32 gradients are not rounded, and for bfloat16 PyTorch has no
    matmul with a float32 result.
    """
    return world.device.type != "cpu" and can_sum_in_matmuls(config, world.size)


@contextmanager
def sum_in_matmuls(model: nn.Module) -> Iterator[None]:
    """Let the matmuls of an update's backwards sum the weight gradients over micro-batches.

    FSDP2 rounds each gradient to `training.dtype`, and sums whole gradients in a pass of its own.
    Here it finds the sums complete; it reduces and frees them. Since PyTorch 2.15 they are freed at
    the end of this context.
    """
    weights = list(_linear_weights(model))
    for weight in weights:
        zeros = torch.zeros(weight.sharded_param.shape, dtype=torch.float32, device=weight.device)
        setattr(weight, _SUM, zeros)
        for module in _owners(weight):
            if module.main_grad_of is None:
                module.main_grad_of = partial(getattr, weight, _SUM)
    yield
    for weight in weights:
        setattr(weight, _SUM, None)


def set_last_micro_batch(model: Llama, is_last: bool, parallel: ParallelConfig) -> None:
    """Prepare forward and backward of a micro-batch, which may be the last of its update.

    Without FSDP2 there is nothing to prepare.

    `accumulate = "unsharded"`: each device sums its whole gradients in `reduce_dtype`, and the last
    micro-batch reduces the sums. An update then communicates once, however many micro-batches it
    has.

    `accumulate = "sharded"`: every micro-batch reduce-scatters its gradients, and each device sums
    its shards. Replicas sum their shards in `reduce_dtype` and all-reduce them with the last
    micro-batch; without replicas the sums are float32.

    Gathered parameters stay between micro-batches unless `reshard_after_forward` frees them.
    """
    if not isinstance(model, FSDPModule):
        return
    if is_last and AUTOGRAD_SUMS:
        for weight in _linear_weights(model):
            # Not before: torch.compile refuses a bfloat16 parameter with a float32 gradient, and
            # the first micro-batch may compile.
            if (main_grad := getattr(weight, _SUM, None)) is not None:
                weight.unsharded_param.grad = main_grad
    reduces = is_last or parallel.accumulate == "sharded"
    model.set_requires_gradient_sync(reduces)
    model.set_requires_all_reduce(is_last)
    # A pending reduction holds a whole group of gradients, so sums in shards do not leave one
    # pending over the next forward.
    model.set_is_last_backward(reduces)
    model.set_reshard_after_backward(is_last or parallel.reshard_after_forward is True)
