"""Which operators a run trains with: kernels by device, attention by measured speed."""

import dataclasses

import torch
from triton import knobs

from fastllama.config import Config
from fastllama_kernels import REFERENCE, TRITON, Operators
from fastllama_kernels.attention_choice import (
    AttentionChoice,
    AttentionShape,
    attention_operator,
    choose_attention,
)


def choose_attention_backend(config: Config, device: torch.device) -> AttentionChoice:
    """The attention backend of the run and the reason for it.

    Raises:
        ValueError: `training.attention` names a backend that cannot run here.
    """
    model, training = config.model, config.training
    shape = AttentionShape(
        batch_size=training.batch_size,
        seq_len=model.max_seq_len,
        n_heads=model.n_heads,
        n_kv_heads=model.kv_heads,
        head_dim=model.head_width,
        dtype=getattr(torch, training.dtype),
        device=device,
    )
    return choose_attention(shape, training.attention)


def build_operators(config: Config, device: torch.device, attention: str) -> Operators:
    """The operators of the model, with the attention backend of this name.

    Raises:
        ValueError: `training.kernels` or the backend cannot run here.
    """
    operators = TRITON if uses_triton(config.training.kernels, device) else REFERENCE
    return dataclasses.replace(operators, attention=attention_operator(attention))


def uses_triton(kernels: str, device: torch.device) -> bool:
    """Whether `training.kernels` means the Triton kernels on `device`.

    Raises:
        ValueError: `kernels` is "triton" and they cannot run on `device`.
    """
    if kernels == "auto":
        return device.type == "cuda"
    # The interpreter runs them anywhere, but far too slowly for more than a test.
    if kernels == "triton" and device.type != "cuda" and not knobs.runtime.interpret:
        raise ValueError(
            f"training.kernels = triton needs a CUDA device, and training is on {device.type}; "
            "use auto or reference."
        )
    return kernels == "triton"
