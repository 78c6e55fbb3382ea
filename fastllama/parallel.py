"""Processes, devices, and the model sharded over them; one process is the same case."""

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from fastllama.config import Config
from fastllama.model import Llama

Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def from_main(self, compute: Callable[[], Result]) -> Result:
        """What the main process computes, on every process; a ValueError it raises as well."""
        outcome: list[Any] = [None]
        if self.is_main:
            try:
                outcome = [compute()]
            except ValueError as error:
                outcome = [error]
        dist.broadcast_object_list(outcome)
        if isinstance(outcome[0], ValueError):
            raise outcome[0]
        return cast(Result, outcome[0])

    def agree(self, value: Tensor) -> Tensor:
        """The main process's value of a tensor, on every process."""
        if self.size > 1:
            dist.broadcast(value, src=0)
        return value

    def mean(self, value: Tensor) -> Tensor:
        """Average a small tensor over the processes, in place, without a host wait."""
        if self.size > 1:
            dist.all_reduce(value)
            value /= self.size
        return value


def world_size() -> int:
    """Processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def choose_device(kind: str) -> torch.device:
    """The device of this process for "auto", "cuda" or "cpu".

    Raises:
        ValueError: CUDA is asked for and missing, or has fewer devices than local processes.
    """
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(
            "The device cuda was asked for, but PyTorch sees none here; use auto or cpu."
        )
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if processes > gpus:
        raise ValueError(
            f"{processes} processes were started on a node with {gpus} GPUs, and each needs one; "
            "lower --nproc-per-node."
        )
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def distributed(config: Config) -> Iterator[World]:
    """Join the process group torchrun describes, or a group of one, and leave it at the end."""
    device = choose_device(config.training.device)
    timeout = timedelta(minutes=config.parallel.timeout_minutes)
    on_cuda = device.type == "cuda"
    if not on_cuda:
        keep_freed_memory()
    backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
    device_id = device if on_cuda else None
    if on_cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout, device_id=device_id)
    else:
        # A store inside the process: no port is opened for a run of one.
        dist.init_process_group(
            backend,
            timeout=timeout,
            device_id=device_id,
            store=dist.HashStore(),
            rank=0,
            world_size=1,
        )
    try:
        size = dist.get_world_size()
        mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
        yield World(rank=dist.get_rank(), size=size, device=device, mesh=mesh)
    finally:
        dist.destroy_process_group()


def keep_freed_memory() -> None:
    """Have glibc keep freed buffers instead of handing them back to the kernel.

    Every update frees and allocates the same large buffers; mapped anew each time, their pages
    are faulted in and zeroed again. Other C libraries have no such switch and are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_mmap_max, never = -1, -4, 2**31 - 1
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, never)


def shard_model(model: Llama, config: Config, world: World) -> None:
    """Shard a meta-device model block by block and allocate this process's part.

    Parameters are float32 shards; they are gathered and computed with in `training.dtype`, and
    gradients are reduced in float32. `cast_forward_inputs` is off because the rotary tables go
    through the blocks' inputs and must stay float32.
    """
    dtype = getattr(torch, config.training.dtype)
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    reshard = config.parallel.reshard_after_forward
    for block in model.blocks:
        fully_shard(block, mesh=world.mesh, mp_policy=policy, reshard_after_forward=reshard)
    # The root's own weights, embedding and output, are the first that the backward needs again.
    fully_shard(model, mesh=world.mesh, mp_policy=policy, reshard_after_forward=False)
    model.to_empty(device=world.device)


def reshard(model: Llama) -> None:
    """Give up gathered parameters after forwards that no backward follows.

    Until then the model's parameters are not the shards the optimizer and checkpoints work on.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def set_last_micro_batch(model: FSDPModule, is_last: bool, reshard: bool) -> None:
    """Reduce gradients after the last micro-batch of an update only.

    Until then they accumulate in float32 on this device, and unless `reshard` saves memory the
    gathered parameters stay too, so an update communicates once however many micro-batches it has.
    """
    model.set_requires_gradient_sync(is_last)
    model.set_is_last_backward(is_last)
    model.set_reshard_after_backward(is_last or reshard)
