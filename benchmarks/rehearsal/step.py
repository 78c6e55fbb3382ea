"""One update of the trainer on the null device, in a process of its own.

    python -m benchmarks.rehearsal.step CASE FOLDER

CASE is a `Case` as JSON. Writes FOLDER/update.log, the calls of the last of three updates, and
FOLDER/measured.json, a `Measured`.
"""

import ctypes
import dataclasses
import json
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.rehearsal.case import Case, Measured
from benchmarks.rehearsal.cudnn import replace_operators
from benchmarks.rehearsal.mistakes import MISTAKES
from benchmarks.training.trainer import open_training
from benchmarks.training.workload import with_synthetic_data
from fastllama.checkpoints.state import TrainState
from fastllama.config import Config
from fastllama.data.loader import BatchLoader
from fastllama.distributed import world as distributed_world
from fastllama.planning.memory import plan_memory
from fastllama.train import train_step
from fastllama.training.stopping import StopSignal
from fastllama_kernels import attention_choice

WARM_UPS = 2
"""Updates before the one that is logged: they compile, and allocate what later ones use again."""


def believe_in_determinism() -> None:
    """Accept an attention backend without comparing its results, of which none is equal: to the
    host, every number of the null device is 0, and so is "equal"."""
    attention_choice._determinism_failure = lambda operator, shape: None


def join_alone(n_ranks: int) -> None:
    """Make this process rank 0 of `n_ranks`. No other comes, and the null NCCL waits for none."""

    def join(backend: str, timeout: timedelta, device_id: torch.device | None) -> None:
        dist.init_process_group(
            "nccl",
            timeout=timeout,
            device_id=device_id,
            store=FakeStore(),
            rank=0,
            world_size=n_ranks,
        )

    distributed_world._join_others = join
    distributed_world.pids_of_node = dict


def names_of_streams(state: TrainState, loader: BatchLoader) -> dict[str, str]:
    """Streams by their addresses, as the log has them."""
    streams = {"compute": torch.cuda.current_stream(), "loader": loader._copy_stream}
    assert isinstance(state.model, FSDPModule)
    communication = state.model._get_fsdp_state()._comm_ctx
    streams |= {
        "gather copies": communication.all_gather_copy_in_stream,
        "gather": communication.all_gather_stream,
        "reduce": communication.reduce_scatter_stream,
        "reduce replicas": communication.all_reduce_stream,
    }
    addresses = {name: stream.cuda_stream for name, stream in streams.items() if stream is not None}
    # The first name of an address counts: FSDP2 may use one stream for two purposes.
    return {
        hex(address) if address else "(nil)": name
        for name, address in reversed(list(addresses.items()))
    }


def measure(config: Config, folder: Path, mistake: str) -> Measured:
    """Do three updates of `config`, and log the last one."""
    runtime = ctypes.CDLL(None)
    with open_training(config) as (session, state, loader):
        if mistake:
            MISTAKES[mistake](state)
        stop = StopSignal()
        for _ in range(WARM_UPS):
            train_step(session, state, loader, stop)
        torch.cuda.reset_peak_memory_stats()
        before: dict[str, Any] = torch.cuda.memory_stats()
        runtime.null_log_to(str(folder / "update.log").encode())
        began = time.perf_counter()
        train_step(session, state, loader, stop)
        seconds = time.perf_counter() - began
        runtime.null_log_to(None)
        after: dict[str, Any] = torch.cuda.memory_stats()
        return Measured(
            host_s=seconds,
            peak_bytes=after["allocated_bytes.all.peak"],
            reserved_bytes=after["reserved_bytes.all.peak"],
            allocator_retries=after["num_alloc_retries"] - before["num_alloc_retries"],
            planned_bytes=plan_memory(session.config, session.world.size).total,
            config=session.config.to_dict(),
            streams=names_of_streams(state, loader),
        )


def main(case: Case, folder: Path) -> None:
    replace_operators()
    believe_in_determinism()
    if case.ranks > 1:
        join_alone(case.ranks)
    with tempfile.TemporaryDirectory() as data:
        config = with_synthetic_data(case.config(), Path(data) / "data")
        measured = measure(config, folder, case.mistake)
    (folder / "measured.json").write_text(json.dumps(dataclasses.asdict(measured)))


if __name__ == "__main__":
    main(Case(**json.loads(sys.argv[1])), Path(sys.argv[2]))
