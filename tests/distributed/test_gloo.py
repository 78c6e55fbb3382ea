"""FSDP2 over gloo: one group of parameters, and its reduce-scatter."""

from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from fastllama.config import Config, ModelConfig, ParallelConfig, TrainingConfig
from fastllama.distributed.fsdp import shard_model
from fastllama.distributed.gloo import GlooReduceScatter
from fastllama.distributed.world import World, distributed
from fastllama.model.llama import Llama
from fastllama_kernels import REFERENCE

MODEL = ModelConfig(vocab_size=32, n_embd=16, n_layers=3, n_heads=2, multiple_of=16, max_seq_len=8)


@pytest.mark.parametrize(
    ("reshard", "groups"), [(False, {""}), (True, {"", "embedding", "output", "blocks"})]
)
def test_a_model_that_frees_nothing_is_one_group(
    reshard: Literal[True, False], groups: set[str]
) -> None:
    config = Config(
        model=MODEL,
        training=TrainingConfig(device="cpu", dtype="float32"),
        parallel=ParallelConfig(reshard_after_forward=reshard),
    )
    with torch.device("meta"):
        model = Llama(MODEL, REFERENCE)
    with distributed(config) as world:
        shard_model(model, config, World(0, 2, world.device, world.mesh))
    found = {
        name.split(".")[0] for name, part in model.named_modules() if isinstance(part, FSDPModule)
    }
    assert found - {"norm"} == groups


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", [dist.ReduceOp.SUM, dist.ReduceOp.AVG])
@pytest.mark.parametrize("rank", [0, 2])
def test_reduce_scatter_adds_the_parts_of_a_rank(
    rank: int, op: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_ranks, n_elements = 3, 5
    inputs_RRN = torch.randn(n_ranks, n_ranks, n_elements, dtype=dtype)

    def all_to_all_single(received: Tensor, sent: Tensor, group: Any) -> None:
        assert sent.equal(inputs_RRN[rank].flatten())
        received.copy_(inputs_RRN[:, rank].flatten())

    class Group:
        size = staticmethod(lambda: n_ranks)

    monkeypatch.setattr(dist, "all_to_all_single", all_to_all_single)
    output_N = torch.full((n_elements,), torch.nan, dtype=dtype)
    GlooReduceScatter()(output_N, inputs_RRN[rank].flatten(), Group(), op)
    parts_RN = inputs_RRN[:, rank].double()
    expected_N = parts_RN.mean(0) if op == dist.ReduceOp.AVG else parts_RN.sum(0)
    # One rounding for the sum and one for the mean, of at most the sum of absolute values.
    bound_N = 2 * torch.finfo(dtype).eps * parts_RN.abs().sum(0)
    assert ((output_N - expected_N).abs() <= bound_N).all()
