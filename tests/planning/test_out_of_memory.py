"""Errors of lacking memory: which they are, and their sentence."""

import dataclasses

import pytest
import torch

from fastllama.config import Config, ModelConfig, ParallelConfig, TrainingConfig
from fastllama.planning.memory import plan_memory
from fastllama.planning.out_of_memory import is_out_of_memory, out_of_memory

SMALL = ModelConfig(
    vocab_size=64, n_embd=32, n_layers=1, n_heads=2, multiple_of=16, max_seq_len=512
)
LARGE = dataclasses.replace(SMALL, n_embd=16_384, n_layers=16, n_heads=128)


def allocation_error(*size: int) -> Exception:
    """PyTorch's error for a tensor of this size."""
    with pytest.raises((RuntimeError, TypeError)) as failure:
        torch.empty(size)
    return failure.value


def test_errors_of_lacking_memory() -> None:
    for size in ((2**55,), (2**60, 64), (10**30,)):
        assert is_out_of_memory(allocation_error(*size)), size
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert not is_out_of_memory(allocation_error(-1))


@pytest.mark.parametrize(
    ("config", "world_size", "remedies"),
    [
        (Config(LARGE), 1, "choose a smaller model, or use more devices."),
        (
            Config(SMALL, training=TrainingConfig(batch_size=1024)),
            1,
            "lower training.batch_size, or set training.activation_checkpointing.",
        ),
        (
            Config(LARGE),
            8,
            'choose a smaller model, or use more devices, or set parallel.accumulate = "sharded", '
            "or set parallel.reshard_after_forward = true.",
        ),
        (
            Config(
                LARGE,
                parallel=ParallelConfig(reshard_after_forward=True, accumulate="sharded"),
            ),
            8,
            "choose a smaller model, or use more devices.",
        ),
        # There is nothing to shard over.
        (
            Config(LARGE, parallel=ParallelConfig(replicate=8)),
            8,
            "choose a smaller model, or use more devices.",
        ),
        # One micro-batch has no sums.
        (
            Config(LARGE, training=TrainingConfig(tokens_per_update=2**14)),
            8,
            "choose a smaller model, or use more devices, or set "
            "parallel.reshard_after_forward = true.",
        ),
    ],
)
def test_sentence_has_the_plan_and_its_remedies(
    config: Config, world_size: int, remedies: str
) -> None:
    sentence = out_of_memory(MemoryError(), config, world_size, "in update 3")
    assert sentence.startswith("Out of memory in update 3: MemoryError. The plan per device is ")
    plan = plan_memory(config, world_size)
    assert f"{plan.total / 2**30:,.1f} GiB (parameters {plan.parameters / 2**30:,.1f}" in sentence
    assert sentence.endswith(f"); {remedies}")
