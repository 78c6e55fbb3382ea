"""Seconds in collectives, and the number of collectives of an update against the plan."""

import time
from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastllama.config import Config, ModelConfig, ParallelConfig, TrainingConfig
from fastllama.data.batch import Batch
from fastllama.distributed.collective_clock import CollectiveClock, HostEvent
from fastllama.distributed.world import World, build_mesh
from fastllama.train import train_step
from fastllama.training.setup import build_state
from fastllama.training.stopping import StopSignal
from fastllama_kernels import REFERENCE
from tests.sessions import bare_session, fresh_start


@pytest.mark.parametrize("on_cuda", [False, True])
def test_lap_returns_the_update_before_the_last(
    on_cuda: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    if on_cuda:
        # An event of a GPU that is never behind its host.
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: HostEvent())
    clock, laps = CollectiveClock(), []
    for update in (1, 2, 3, 4, 5):
        laps.append(clock.lap())
        for seconds in (update, 10 * update):
            with clock.collective(on_cuda):
                now += seconds
        # Other work is not measured.
        now += 1000
    assert laps == [0, 0, 11, 22, 33]


class CollectiveCounter(TorchDispatchMode):
    """Counts collectives by kind."""

    KINDS = {"allgather": "all-gather", "reduce_scatter": "reduce-scatter"} | dict.fromkeys(
        ("allreduce", "all_reduce"), "all-reduce"
    )

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if DTensor in types:
            return NotImplemented  # It calls the collectives of its shards.
        name = str(operator)
        if name.startswith(("c10d.", "_c10d_functional.")) and "wrap_tensor" not in name:
            (kind,) = {kind for part, kind in self.KINDS.items() if part in name}
            self.counts[kind] += 1
        return operator(*args, **(kwargs or {}))


L = 3


@pytest.mark.usefixtures("rank_0_of_8")
@pytest.mark.parametrize("n_micro_batches", [1, 3])
@pytest.mark.parametrize("accumulate", ["unsharded", "sharded"])
@pytest.mark.parametrize("reshard", [False, True])
@pytest.mark.parametrize("replicate", [1, 2])
def test_collectives_of_an_update(
    replicate: int, reshard: bool, accumulate: Any, n_micro_batches: int
) -> None:
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    model = ModelConfig(
        vocab_size=32, n_embd=16, n_layers=L, n_heads=2, multiple_of=16, max_seq_len=8
    )
    training = TrainingConfig(
        batch_size=1,
        tokens_per_update=64 * n_micro_batches,
        training_tokens=640 * n_micro_batches,
        device="cpu",
        dtype="float32",
        compile=False,
    )
    parallel = ParallelConfig(
        replicate=replicate, reshard_after_forward=reshard, accumulate=accumulate
    )
    config = Config(model=model, training=training, parallel=parallel)
    session = bare_session(config, World(0, 8, torch.device("cpu"), build_mesh("cpu", replicate)))
    state = build_state(session, fresh_start(), REFERENCE)
    loader = cast(Any, SimpleNamespace(next=lambda: Batch(tokens, tokens, None, None)))
    for _ in range(2):
        with CollectiveCounter() as counter:
            train_step(session, state, loader, StopSignal())
        # The table of docs/distributed.md.
        assert counter.counts == {
            "all-gather": n_micro_batches * (2 * L + 1) if reshard else L + 2,
            "reduce-scatter": (n_micro_batches if accumulate == "sharded" else 1) * (L + 2),
            "all-reduce": 2 if replicate == 1 else L + 5,
        }
