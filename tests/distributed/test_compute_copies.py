"""One process on a CPU trains without FSDP2, and computes the same bits."""

import contextlib
import dataclasses

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from fastllama.config import Config, ModelConfig, ParallelConfig, TrainingConfig
from fastllama.distributed.compute_copies import ComputeCopies
from fastllama.distributed.fsdp import AUTOGRAD_SUMS, set_last_micro_batch, shard_model
from fastllama.distributed.world import distributed
from fastllama.model.llama import Llama
from fastllama_kernels import REFERENCE

MODEL = ModelConfig(vocab_size=32, n_embd=16, n_layers=2, n_heads=2, multiple_of=16, max_seq_len=8)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def model_and_gradients(
    tied: bool, dtype: str, *, with_fsdp2: bool
) -> tuple[Llama, dict[str, Tensor]]:
    """A model after an update of three micro-batches, and the gradients of all its weights."""
    config = Config(
        model=dataclasses.replace(MODEL, tied_embeddings=tied),
        training=TrainingConfig(dtype=dtype, device="cpu"),  # type: ignore[arg-type]
        parallel=ParallelConfig(reshard_after_forward=False, accumulate="unsharded"),
    )
    with distributed(config) as world:
        if with_fsdp2:
            # The mesh still has one process.
            world = dataclasses.replace(world, size=2)
        with torch.device("meta"):
            model = Llama(config.model, REFERENCE)
        shard_model(model, config, world)
        model.init_weights(0)
        assert isinstance(model, FSDPModule) == with_fsdp2
        copies = None
        if not with_fsdp2 and dtype == "bfloat16":
            copies = ComputeCopies(model, torch.bfloat16)
        generator = torch.Generator().manual_seed(0)
        batches = torch.randint(32, (3, 2, 2, 8), generator=generator)
        with copies.in_place() if copies else torch.enable_grad():
            for number, (tokens, targets) in enumerate(batches):
                set_last_micro_batch(model, number == 2, config.parallel)
                model(tokens, targets).backward()
        gradients = {}
        for name, weight in model.named_parameters():
            assert weight.dtype == torch.float32
            assert weight.grad is not None
            gradients[name] = whole(weight.grad)
    return model, gradients


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_gradients_have_the_bits_of_fsdp2(tied: bool, dtype: str) -> None:
    _, expected = model_and_gradients(tied, dtype, with_fsdp2=True)
    _, found = model_and_gradients(tied, dtype, with_fsdp2=False)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.any(), name
        if AUTOGRAD_SUMS and tied and dtype == "bfloat16" and name == "embedding.weight":
            # FSDP2 adds the gradients of both uses in bfloat16, once in each micro-batch.
            bound = 3 * torch.finfo(torch.bfloat16).eps * gradient.abs().max()
            assert (found[name] - gradient).abs().max() <= bound
        else:
            assert torch.equal(found[name], gradient), name


def test_copies_are_those_of_the_weights_as_they_are() -> None:
    model = Llama(dataclasses.replace(MODEL, tied_embeddings=True), REFERENCE)
    model.init_weights(0)
    weights = dict(model.named_parameters())
    copies = ComputeCopies(model, torch.bfloat16)
    with torch.no_grad():
        model.norm.weight.add_(1.0)
    with contextlib.suppress(KeyboardInterrupt), copies.in_place():
        inside = dict(model.named_parameters())
        assert inside.keys() == weights.keys()
        assert model.output.weight is model.embedding.weight
        for name, weight in weights.items():
            assert torch.equal(inside[name], weight.bfloat16()), name
        raise KeyboardInterrupt
    assert all(weight is weights[name] for name, weight in model.named_parameters())
    assert model.output.weight is model.embedding.weight
