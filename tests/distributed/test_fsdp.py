"""FSDP2: prefetching, the dtype of reductions, resharding by memory."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from fastllama.config import Config, ModelConfig, ParallelConfig, TrainingConfig, load_recipe
from fastllama.distributed.fsdp import resolve_resharding, shard_model
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
    reduced: list[torch.dtype] = []

    class RecordReduceScatter(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if operator is torch.ops.c10d._reduce_scatter_base_.default:
                reduced.append(args[0].dtype)
            return operator(*args, **(kwargs or {}))

    model = sharded_model(reduce_dtype=dtype)
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    with RecordReduceScatter():
        model(tokens, tokens).backward()
    # Three blocks, and the rest of the model.
    assert reduced == [getattr(torch, dtype)] * 4


@pytest.mark.parametrize(("gibibytes", "reshard"), [(80, False), (40, True)])
def test_device_memory_decides_resharding(
    gibibytes: int, reshard: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(total_memory=gibibytes * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    config = load_recipe(RECIPE)
    with distributed(Config(training=TrainingConfig(device="cpu"))) as world:
        # The main process of 64 decides, as in a real run.
        one_of_many = dataclasses.replace(world, size=64, device=torch.device("cuda"))
        resolved, reason = resolve_resharding(config, one_of_many)
        on_cpu, _ = resolve_resharding(config, world)
    assert resolved.parallel.reshard_after_forward is reshard
    assert f"keeping them needs 42.5 of {gibibytes}.0 GiB" in reason
    assert on_cpu.parallel.reshard_after_forward is False
    # The run folder saves the option as given.
    assert config.parallel.reshard_after_forward == "auto"
