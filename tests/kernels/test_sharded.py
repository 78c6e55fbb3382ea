"""Triton operators in a model that FSDP2 shards over two ranks, as in the trainer.

One launch of this file under torchrun runs every case. It runs in Triton's interpreter, even on a
machine with a GPU, because two ranks cannot share one.
"""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, cast

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastllama.config import Config, ModelConfig, ParallelConfig, TrainingConfig
from fastllama.distributed.fsdp import set_last_micro_batch, shard_model, sum_in_matmuls
from fastllama.distributed.world import World, distributed
from fastllama.model.activation_checkpointing import checkpoint_activations
from fastllama.model.llama import Llama
from fastllama_kernels import REFERENCE, TRITON, Operators
from tests.compare import assert_as_exact_as
from tests.kernels.small_model import GROUPED, MULTI_HEAD, TIED, random_tokens

N_RANKS, SEQ_LEN = 2, 3


@dataclass(frozen=True)
class Case:
    """One configuration."""

    model: ModelConfig = GROUPED
    dtype: str = "float32"
    reshard: bool = False
    accumulate: Literal["unsharded", "sharded"] = "unsharded"
    recompute: Literal["none", "selective", "full"] = "none"
    n_micro_batches: int = 1
    frozen: tuple[str, ...] = ()
    compile: bool = False
    sum_in_matmuls: bool = False


CASES = {
    "gathered once": Case(),
    "gathered twice": Case(reshard=True),
    "bfloat16": Case(dtype="bfloat16"),
    "recomputed": Case(recompute="selective", reshard=True),
    "tied": Case(model=TIED),
    "accumulated": Case(n_micro_batches=2, reshard=True),
    "accumulated in shards": Case(n_micro_batches=2, accumulate="sharded"),
    "frozen": Case(frozen=("embedding", "blocks.0.attention.qkv", "blocks.1.mlp.down", "output")),
    "compiled": Case(model=MULTI_HEAD, dtype="bfloat16", compile=True),
    "summed in matmuls": Case(n_micro_batches=3, sum_in_matmuls=True, recompute="full"),
    "summed in matmuls, tied": Case(model=TIED, n_micro_batches=2, sum_in_matmuls=True),
    "summed in matmuls, frozen": Case(
        n_micro_batches=2,
        sum_in_matmuls=True,
        frozen=("blocks.0.attention.qkv", "blocks.1.mlp.down", "blocks.1.attention.output"),
    ),
    "summed in matmuls, compiled": Case(
        model=MULTI_HEAD,
        dtype="bfloat16",
        n_micro_batches=2,
        sum_in_matmuls=True,
        recompute="selective",
        compile=True,
    ),
}


@pytest.fixture(scope="module")
def failures() -> dict[str, str | None]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, f"--nproc-per-node={N_RANKS}", __file__],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "PYTHONPATH": ":".join(sys.path),
            "TRITON_INTERPRET": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        },
    )
    assert done.returncode == 0, done.stderr
    return cast(dict[str, str | None], json.loads(done.stdout))


@pytest.mark.parametrize("name", CASES)
def test_gradients_match_one_process(name: str, failures: dict[str, str | None]) -> None:
    assert failures[name] is None, failures[name]


def loss_and_gradients(case: Case, operators: Operators, world: World) -> dict[str, Tensor]:
    """Loss and gradients of one update over all sequences, the same on every rank."""
    training = TrainingConfig(dtype=case.dtype, activation_checkpointing=case.recompute)
    parallel = ParallelConfig(reshard_after_forward=case.reshard, accumulate=case.accumulate)
    config = Config(model=case.model, training=training, parallel=parallel)
    with torch.device("meta"):
        model = Llama(case.model, operators)
    checkpoint_activations(model, config)
    for name in case.frozen:
        model.get_submodule(name).requires_grad_(False)
    if case.compile and operators is TRITON:
        for block in model.blocks:
            block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    shard_model(model, config, world)
    model.init_weights(seed=0)
    total = torch.zeros(())
    with sum_in_matmuls(model) if case.sum_in_matmuls else nullcontext():
        for micro_batch, sequences in enumerate(sequences_of(case)):
            is_last = micro_batch == case.n_micro_batches - 1
            set_last_micro_batch(model, is_last, parallel)
            tokens, targets = sequences[:, world.rank]
            loss = model(tokens[None], targets[None]) / case.n_micro_batches
            loss.backward()
            total += loss.detach()
    found = {"loss": world.mean(total)}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            found[name] = cast(DTensor, weight.grad).full_tensor()
    return found


def exact_loss_and_gradients(case: Case) -> dict[str, Tensor]:
    """The same in one process and one batch, in float64."""
    model = Llama(case.model, REFERENCE)
    model.init_weights(seed=0)
    for weight in model.parameters():
        weight.data = weight.data.to(getattr(torch, case.dtype))
    model.double()
    tokens, targets = sequences_of(case).transpose(0, 1).flatten(1, 2)
    loss = model(tokens, targets)
    loss.backward()
    gradients = {name: cast(Tensor, weight.grad) for name, weight in model.named_parameters()}
    return {"loss": loss.detach(), **gradients}


def sequences_of(case: Case) -> Tensor:
    """Token ids (n_micro_batches, 2, N_RANKS, SEQ_LEN); the 2 is for tokens and targets."""
    return random_tokens(case.model, case.n_micro_batches, 2, N_RANKS, SEQ_LEN)


def check(case: Case, world: World) -> None:
    actual, plain = (
        loss_and_gradients(case, operators, world) for operators in (TRITON, REFERENCE)
    )
    exact = exact_loss_and_gradients(case)
    assert list(actual) == [name for name in exact if not name.startswith(case.frozen)]
    # Gradients are reduced in float32 but have the precision of the compute dtype.
    dtype = getattr(torch, case.dtype)
    for name, value in actual.items():
        assert_as_exact_as(value.to(dtype), plain[name].to(dtype), exact[name])


def main() -> None:
    """Print a JSON object: the error of each case, or null."""
    failures: dict[str, str | None] = {}
    training, parallel = TrainingConfig(device="cpu"), ParallelConfig(timeout_minutes=1)
    with distributed(Config(training=training, parallel=parallel)) as world:
        for name, case in CASES.items():
            try:
                check(case, world)
                failures[name] = None
            except Exception as error:
                failures[name] = f"rank {world.rank}: {error!r}"
        if world.is_main:
            print(json.dumps(failures))


if __name__ == "__main__":
    main()
