"""The processes of a run and their devices. A single process runs the same code."""

import ctypes
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fastllama.config import Config
from fastllama.console import ctrl_c_ends_process
from fastllama.distributed.collective_clock import CollectiveClock
from fastllama.distributed.failures import abort_process_group, failures_told, pids_of_node
from fastllama.errors import TrainingFailedError
from fastllama.printable import one_line

Result = TypeVar("Result")

# Public since PyTorch 2.14, where the older name prints a warning.
_set_timeout: Callable[[timedelta, dist.ProcessGroup | None], None] = (
    getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout
)


@dataclass(frozen=True)
class World:
    """This process among the processes of the run."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    pids: Mapping[int, int] = field(default_factory=dict)
    """The process id of each rank on this node."""
    collectives: CollectiveClock = field(default_factory=CollectiveClock)
    """Measures the collectives of this rank."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def failures_told(self) -> AbstractContextManager[None]:
        """Report a failure of this rank inside, before anything outside can block.

        Raises:
            RankFailedError, PeerFailedError: as `distributed`.
        """
        return failures_told(self.rank, self.size, self.pids)

    def from_main(self, compute: Callable[[], Result]) -> Result:
        """Call `compute` on the main process; all return its result or raise its ValueError."""
        outcome: list[Any] = [None]
        if self.is_main:
            try:
                outcome = [compute()]
            except ValueError as error:
                outcome = [error]
        dist.broadcast_object_list(outcome)
        if isinstance(outcome[0], ValueError):
            # pop, because the list would keep error and frame in a reference cycle. The frame holds
            # the process group, whose threads abort the interpreter at shutdown.
            raise outcome.pop()
        return cast(Result, outcome[0])

    def agree(self, value: Tensor) -> Tensor:
        """Overwrite a tensor with the main process's value."""
        if self.size > 1:
            dist.broadcast(value, src=0)
        return value

    def mean(self, value: Tensor) -> Tensor:
        """Average a small tensor over the processes in place, without a host synchronisation."""
        if self.size > 1:
            dist.all_reduce(value)
            value /= self.size
        return value

    def set_timeout(self, minutes: float) -> None:
        """Set the timeout of later collectives; every process calls it."""
        # Otherwise one process could wait under the new timeout and another under the old one.
        dist.barrier()
        for group in (dist.group.WORLD, *self.mesh.get_all_groups()):
            _set_timeout(timedelta(minutes=minutes), group)


def world_size() -> int:
    """Number of processes that torchrun started; 1 without it.

    Raises:
        ValueError: the environment variable WORLD_SIZE is no number of processes.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if not re.fullmatch("0*[1-9][0-9]{0,8}", size):
        raise ValueError(
            f"WORLD_SIZE = {size!r} is no number of processes; unset it, or start with torchrun."
        )
    return int(size)


def require_launcher() -> None:
    """Check that the variables of a launcher are complete, before a training starts.

    Raises:
        ValueError: WORLD_SIZE names several processes, and RANK is missing or not one of them, or
            nothing says where they meet.
    """
    size = world_size()
    if "RANK" not in os.environ:
        if size > 1:
            raise ValueError(
                f"WORLD_SIZE = {size}, but RANK is not set; start with torchrun, or unset "
                "WORLD_SIZE."
            )
        return
    rank = os.environ["RANK"]
    if not (rank.isascii() and rank.isdecimal() and int(rank) < size):
        raise ValueError(
            f"RANK = {rank!r} is none of the {size} processes of WORLD_SIZE, which count from 0; "
            "start with torchrun, or unset both."
        )
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if size > 1 and not os.environ.get(name):
            raise ValueError(
                f"WORLD_SIZE = {size}, but {name} is not set; start with torchrun, or unset RANK "
                "and WORLD_SIZE."
            )


def nccl_settings() -> str:
    """NCCL's version and the environment variables that configure it, on one line."""
    version = ".".join(map(str, torch.cuda.nccl.version()))
    names = sorted(name for name in os.environ if re.match("NCCL_|TORCH_NCCL_|TORCH_FR_", name))
    return ", ".join([version, *(f"{name}={os.environ[name]}" for name in names)])


def choose_device(kind: str, option: str = "training.device") -> torch.device:
    """The device of this process for "auto", "cuda" or "cpu", the value of `option`.

    Where every process sees all GPUs of its node, the local rank is the index. Where the launcher
    shows each process a single GPU, the process takes that GPU.

    Raises:
        ValueError: CUDA is missing, or the node has fewer GPUs than processes.
    """
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(f"{option} = cuda, but PyTorch sees no GPU here; use auto or cpu.")
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    visible = list(filter(None, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")))
    if gpus == 1 and len(visible) == 1:
        return torch.device("cuda", 0)
    if processes > gpus:
        raise ValueError(
            f"{processes} processes were started on a node with {gpus} GPUs, and each needs one; "
            "lower --nproc-per-node, or let each process see all GPUs of its node."
        )
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def distributed(config: Config) -> Iterator[World]:
    """Join the process group that torchrun describes, or a group of one, and leave it at the end.

    Raises:
        RankFailedError: this rank failed before any other, and has told so.
        PeerFailedError: this rank failed after another one, and has told so.
    """
    device = choose_device(config.training.device)
    timeout = timedelta(minutes=config.parallel.timeout_minutes)
    on_cuda = device.type == "cuda"
    if not on_cuda:
        keep_freed_memory()
    # cuBLAS may split a long sum, as over the tokens of a weight gradient, and would then add the
    # parts in bfloat16.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
    device_id = device if on_cuda else None
    if on_cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        _join_others(backend, timeout, device_id)
    else:
        # A store inside the process: a run of one process opens no port.
        dist.init_process_group(
            backend,
            timeout=timeout,
            device_id=device_id,
            store=dist.HashStore(),
            rank=0,
            world_size=1,
        )
    rank, size = dist.get_rank(), dist.get_world_size()
    try:
        with failures_told(rank, size, {}):
            mesh = build_mesh(device.type, config.parallel.replicate)
            world = World(rank, size, device, mesh, pids_of_node())
            # Subgroups of the mesh start with PyTorch's default timeout.
            world.set_timeout(config.parallel.timeout_minutes)
        with world.failures_told():
            yield world
    except BaseException:
        abort_process_group()
        raise
    dist.destroy_process_group()


def _join_others(backend: str, timeout: timedelta, device_id: torch.device | None) -> None:
    """Join the process group that the environment variables of a launcher describe.

    Raises:
        ValueError: a variable is missing or wrong, or the address cannot be used.
        TrainingFailedError: the other processes did not come in time.
    """
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    if os.environ["RANK"] == "0" and world_size() > 1:
        print(f"waiting for {world_size()} processes at {address}", file=sys.stderr, flush=True)
    try:
        with ctrl_c_ends_process():
            dist.init_process_group(backend, timeout=timeout, device_id=device_id)
    except dist.DistStoreError as error:
        raise TrainingFailedError(
            f"Not all of the {world_size()} processes came to {address}: {one_line(error, 300)}"
        ) from None
    except (ValueError, dist.DistNetworkError) as error:
        raise ValueError(
            f"The processes cannot meet at {address} ({one_line(error, 300)}); start with "
            "torchrun, or correct MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE."
        ) from None


def build_mesh(device_type: str, replicate: int) -> DeviceMesh:
    """All processes as one dimension, ("shard",), or as two, ("replicate", "shard").

    Neighbouring ranks form a shard group. With one replica a node, gathers stay inside the node.
    """
    size = dist.get_world_size()
    if replicate == 1:
        return init_device_mesh(device_type, (size,), mesh_dim_names=("shard",))
    shape = (replicate, size // replicate)
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))


def keep_freed_memory() -> None:
    """Make glibc keep freed buffers instead of returning them to the kernel.

    Every update frees and allocates the same large buffers. If glibc returned them, the kernel
    would map and zero their pages again each time. Other C libraries lack the switch.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_mmap_max, never = -1, -4, 2**31 - 1
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, never)
