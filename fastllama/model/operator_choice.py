"""Which operators a run trains with: kernels by the device, attention by what is fastest there."""

import dataclasses

import torch
from triton import knobs

from fastllama.config import Config
from fastllama.distributed.world import World
from fastllama_kernels import REFERENCE, TRITON, Operators
from fastllama_kernels.attention_choice import (
    AttentionShape,
    attention_operator,
    choose_attention,
)


def choose_operators(config: Config, world: World) -> tuple[Operators, str]:
    """The operators of the model, and which they are and why, for the log.

    The main process chooses for all: two that differ by a rounding would train as one model.

    Raises:
        ValueError: what `training.kernels` or `training.attention` ask for cannot run here.
    """
    model, training = config.model, config.training
    operators = TRITON if uses_triton(training.kernels, world.device) else REFERENCE
    shape = AttentionShape(
        batch_size=training.batch_size,
        seq_len=model.max_seq_len,
        n_heads=model.n_heads,
        n_kv_heads=model.kv_heads,
        head_dim=model.head_dim,
        dtype=getattr(torch, training.dtype),
        device=world.device,
    )
    choice = world.from_main(lambda: choose_attention(shape, training.attention))
    operators = dataclasses.replace(operators, attention=attention_operator(choice.name))
    return operators, f"{operators.name}; attention {choice.name}: {choice.reason}"


def uses_triton(kernels: str, device: torch.device) -> bool:
    """Whether `training.kernels` means the Triton kernels on `device`.

    Raises:
        ValueError: they are asked for where they cannot run.
    """
    if kernels == "auto":
        return device.type == "cuda"
    # The interpreter runs them anywhere, far too slowly for more than a test.
    if kernels == "triton" and device.type != "cuda" and not knobs.runtime.interpret:
        raise ValueError(
            f"training.kernels = triton needs a CUDA device, and training is on {device.type}; "
            "use auto or reference."
        )
    return kernels == "triton"
