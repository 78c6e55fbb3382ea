"""FSDP2: prefetching, collectives and their dtype, resharding and sums by memory."""

import dataclasses
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastllama.config import Config, ModelConfig, ParallelConfig, TrainingConfig, load_recipe
from fastllama.distributed.fsdp import (
    resolve_by_memory,
    set_last_micro_batch,
    shard_model,
    sum_in_matmuls,
    sums_in_matmuls,
)
from fastllama.distributed.world import World, build_mesh, distributed
from fastllama.model.llama import Linear, Llama
from fastllama_kernels import REFERENCE

RECIPE = Path(__file__).parents[2] / "configs" / "llama-3.1-8b.toml"
MODEL = ModelConfig(vocab_size=32, n_embd=16, n_layers=3, n_heads=2, multiple_of=16, max_seq_len=8)


def sharded_model(shape: ModelConfig = MODEL, dtype: str = "float32", **options: Any) -> Llama:
    """A model sharded over 8 ranks, with `parallel` options."""
    parallel = ParallelConfig(**{"reshard_after_forward": True, **options})
    config = Config(model=shape, training=TrainingConfig(dtype=dtype), parallel=parallel)
    with torch.device("meta"):
        model = Llama(shape, REFERENCE)
    mesh = build_mesh("cpu", parallel.replicate)
    shard_model(model, config, World(0, 8, torch.device("cpu"), mesh))
    return model


class RecordCollectives(TorchDispatchMode):
    """Records each collective: its name, and dtype and elements of its first tensor, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, torch.dtype, int]] = []

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if operator.namespace == "c10d":
            first = next(x for x in tree_leaves(args) if isinstance(x, torch.Tensor))
            name = operator.__name__.partition(".")[0]
            self.calls.append((name, first.dtype, first.numel()))
        return operator(*args, **(kwargs or {}))


@pytest.mark.usefixtures("rank_0_of_8")
def test_groups_are_prefetched_one_ahead() -> None:
    model = sharded_model()
    modules = (model.embedding, *model.blocks, model.output)
    states = [cast(FSDPModule, module)._get_fsdp_state() for module in modules]
    forward = [state._states_to_forward_prefetch for state in states]
    backward = [state._states_to_backward_prefetch for state in states]
    assert forward == [[state] for state in states[1:]] + [[]]
    # The embedding is gathered already, so its prefetch of itself is none.
    assert backward == [[state] for state in (states[0], *states[:-1])]


def reduced_elements(model: Llama) -> list[int]:
    """Elements of this rank in each reduce-scatter of one backward, in order."""
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    with RecordCollectives() as recorded:
        model(tokens, tokens).backward()
    return [size for name, _, size in recorded.calls if name == "_reduce_scatter_base_"]


@pytest.mark.usefixtures("rank_0_of_8")
@pytest.mark.parametrize("tied", [False, True])
def test_output_is_reduced_first_and_embedding_last(tied: bool) -> None:
    model = sharded_model(dataclasses.replace(MODEL, tied_embeddings=tied))
    reduced = reduced_elements(model)
    embedding, block, output, norm = (
        sum(weight.to_local().numel() for weight in module.parameters())
        for module in (model.embedding, model.blocks[0], model.output, model.norm)
    )
    if tied:
        assert reduced == [block, block, block, embedding + norm]
    else:
        assert reduced == [output + norm, block, block, block, embedding]


@pytest.mark.usefixtures("rank_0_of_8")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_reduced_in_reduce_dtype(dtype: str) -> None:
    model = sharded_model(reduce_dtype=dtype)
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    with RecordCollectives() as recorded:
        model(tokens, tokens).backward()
    reduced = [kind for name, kind, _ in recorded.calls if name == "_reduce_scatter_base_"]
    # Three blocks, the embedding, and final norm with output projection.
    assert reduced == [getattr(torch, dtype)] * 5


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
        resolved, reason = resolve_by_memory(config, one_of_many)
        on_cpu, _ = resolve_by_memory(Config(), world)
    parallel = resolved.parallel
    assert (parallel.reshard_after_forward, parallel.accumulate) == expected
    assert f" of {gibibytes}.0 GiB" in reason
    assert on_cpu.parallel.reshard_after_forward is False
    assert on_cpu.parallel.accumulate == "unsharded"
    # The run folder saves the options as given.
    assert config.parallel.reshard_after_forward == config.parallel.accumulate == "auto"


@pytest.mark.usefixtures("rank_0_of_8")
@pytest.mark.parametrize("replicate", [1, 2])
@pytest.mark.parametrize(("accumulate", "n_reductions"), [("unsharded", 5), ("sharded", 15)])
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
            set_last_micro_batch(model, is_last, parallel)
            model(tokens, tokens).backward()
    called = Counter(name for name, *_ in recorded.calls)
    # Three blocks, the embedding, and final norm with output projection.
    assert called["_allgather_base_"] == 5
    assert called["_reduce_scatter_base_"] == n_reductions
    assert called["allreduce_"] == (5 if replicate > 1 else 0)


class CountSums(TorchDispatchMode):
    """Counts the passes that add a gradient, shaped like one of `weights`, to a float32 sum."""

    def __init__(self, weights: list[torch.Tensor]) -> None:
        super().__init__()
        self.shapes = {weight.shape for weight in weights}
        self.count = 0

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if operator is torch.ops.aten.add_.Tensor and args[0].dtype == torch.float32:
            self.count += args[0].shape in self.shapes
        return operator(*args, **(kwargs or {}))


def linear_weights(model: Llama) -> list[torch.Tensor]:
    return [module.weight for module in model.modules() if isinstance(module, Linear)]


def sums(model: Llama) -> list[torch.Tensor]:
    return [
        module.main_grad
        for module in model.modules()
        if isinstance(module, Linear) and module.main_grad is not None
    ]


@pytest.mark.usefixtures("rank_0_of_8")
def test_matmuls_leave_no_sum_to_fsdp2() -> None:
    parallel = ParallelConfig(reshard_after_forward=False, accumulate="unsharded")
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    passes = {}
    for in_matmuls in (False, True):
        model = sharded_model(dtype="bfloat16", **vars(parallel))
        n_weights = len(linear_weights(model))
        with sum_in_matmuls(model) if in_matmuls else nullcontext():
            assert len(sums(model)) == (n_weights if in_matmuls else 0)
            with CountSums(linear_weights(model)) as counted:
                for is_last in (False, False, True):
                    set_last_micro_batch(model, is_last, parallel)
                    model(tokens, tokens).backward()
        passes[in_matmuls] = counted.count
        # The next validation sees no sums.
        assert not sums(model)
    # The embedding has the shape of the output projection, and its gradients stay with FSDP2: they
    # are added from the second micro-batch on.
    assert passes == {False: 2 * (n_weights + 1), True: 2}


@pytest.mark.parametrize(
    ("device", "n_micro_batches", "options", "expected"),
    [
        ("cuda", 2, {}, True),
        ("cuda", 1, {}, False),
        ("cuda", 2, {"accumulate": "sharded"}, False),
        ("cuda", 2, {"reduce_dtype": "bfloat16"}, False),
        ("cpu", 2, {}, False),
    ],
)
def test_matmuls_sum_whole_gradients_on_a_gpu(
    device: str, n_micro_batches: int, options: dict[str, Any], expected: bool
) -> None:
    training = TrainingConfig(batch_size=1, tokens_per_update=64 * n_micro_batches)
    parallel = ParallelConfig(**{"accumulate": "unsharded", **options})
    config = Config(model=MODEL, training=training, parallel=parallel)
    assert sums_in_matmuls(config, World(0, 8, torch.device(device), cast(Any, None))) == expected
