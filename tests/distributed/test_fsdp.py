"""FSDP2: prefetching, collectives and their dtype, resharding and sums by memory."""

import dataclasses
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastllama.config import Config, ModelConfig, ParallelConfig, TrainingConfig, load_recipe
from fastllama.distributed.fsdp import resolve_resharding, set_last_micro_batch, shard_model
from fastllama.distributed.world import World, build_mesh, distributed
from fastllama.model.llama import Llama
from fastllama_kernels import REFERENCE

RECIPE = Path(__file__).parents[2] / "configs" / "llama-3.1-8b.toml"
MODEL = ModelConfig(vocab_size=32, n_embd=16, n_layers=3, n_heads=2, multiple_of=16, max_seq_len=8)


def sharded_model(**options: Any) -> Llama:
    """`MODEL` sharded over 8 ranks, with `parallel` options."""
    parallel = ParallelConfig(**{"reshard_after_forward": True, **options})
    config = Config(model=MODEL, training=TrainingConfig(dtype="float32"), parallel=parallel)
    with torch.device("meta"):
        model = Llama(MODEL, REFERENCE)
    mesh = build_mesh("cpu", parallel.replicate)
    shard_model(model, config, World(0, 8, torch.device("cpu"), mesh))
    return model


class RecordCollectives(TorchDispatchMode):
    """Records the name of each collective and the dtype of its first tensor, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, torch.dtype]] = []

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if operator.namespace == "c10d":
            first = next(x for x in tree_leaves(args) if isinstance(x, torch.Tensor))
            self.calls.append((operator.__name__.partition(".")[0], first.dtype))
        return operator(*args, **(kwargs or {}))


@pytest.mark.usefixtures("rank_0_of_8")
def test_blocks_are_prefetched_one_ahead() -> None:
    model = sharded_model()
    states = [cast(FSDPModule, module)._get_fsdp_state() for module in (model, *model.blocks)]
    _, first, second, third = states
    forward = [state._states_to_forward_prefetch for state in states]
    backward = [state._states_to_backward_prefetch for state in states]
    assert forward == [[first], [second], [third], []]
    assert backward == [[third], [], [first], [second]]


@pytest.mark.usefixtures("rank_0_of_8")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_reduced_in_reduce_dtype(dtype: str) -> None:
    model = sharded_model(reduce_dtype=dtype)
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    with RecordCollectives() as recorded:
        model(tokens, tokens).backward()
    reduced = [kind for name, kind in recorded.calls if name == "_reduce_scatter_base_"]
    # Three blocks, and the rest of the model.
    assert reduced == [getattr(torch, dtype)] * 4


@pytest.mark.parametrize(
    ("gibibytes", "expected"),
    [(100, (False, "unsharded")), (80, (False, "sharded")), (50, (True, "sharded"))],
)
def test_device_memory_decides_resharding_and_sums(
    gibibytes: int, expected: tuple[bool, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(total_memory=gibibytes * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    config = load_recipe(RECIPE)
    with distributed(Config(training=TrainingConfig(device="cpu"))) as world:
        # The main process of 8 decides, as in a real run.
        one_of_many = dataclasses.replace(world, size=8, device=torch.device("cuda"))
        resolved, reason = resolve_resharding(config, one_of_many)
        on_cpu, _ = resolve_resharding(config, world)
    parallel = resolved.parallel
    assert (parallel.reshard_after_forward, parallel.accumulate) == expected
    assert f" of {gibibytes}.0 GiB" in reason
    assert on_cpu.parallel.reshard_after_forward is False
    assert on_cpu.parallel.accumulate == "unsharded"
    # The run folder saves the options as given.
    assert config.parallel.reshard_after_forward == config.parallel.accumulate == "auto"


@pytest.mark.usefixtures("rank_0_of_8")
@pytest.mark.parametrize("replicate", [1, 2])
@pytest.mark.parametrize(("accumulate", "n_reductions"), [("unsharded", 4), ("sharded", 12)])
def test_collectives_of_an_update_with_three_micro_batches(
    replicate: int, accumulate: Literal["unsharded", "sharded"], n_reductions: int
) -> None:
    parallel = ParallelConfig(
        replicate=replicate, reshard_after_forward=False, accumulate=accumulate
    )
    model = sharded_model(**vars(parallel))
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    with RecordCollectives() as recorded:
        for is_last in (False, False, True):
            set_last_micro_batch(cast(FSDPModule, model), is_last, parallel)
            model(tokens, tokens).backward()
    called = Counter(name for name, _ in recorded.calls)
    # A collective for each of the three blocks, and one for the rest of the model.
    assert called["_allgather_base_"] == 4
    assert called["_reduce_scatter_base_"] == n_reductions
    assert called["allreduce_"] == (4 if replicate > 1 else 0)
