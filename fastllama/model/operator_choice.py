"""Which operators a run trains with: kernels by device, attention by measured speed."""

import dataclasses

import torch
from triton import knobs

from fastllama.config import Config, TrainingConfig
from fastllama_kernels import CPU, REFERENCE, TRITON, TRITON_SAVING, Operators
from fastllama_kernels.attention_choice import (
    AttentionChoice,
    AttentionShape,
    attention_operator,
    choose_attention,
)

LONGEST_BY_MATMULS = 1024
"""Context up to which attention by matmuls saves little memory beside the rest of a block."""


def choose_attention_backend(
    config: Config, device: torch.device, n_documents: int | None = None
) -> AttentionChoice:
    """The attention backend of the run and the reason for it.

    `n_documents` is the room for documents that are kept apart; None if they may mix.

    Raises:
        ValueError: `training.attention` names a backend that cannot run here.
    """
    model, training = config.model, config.training
    compiled_on_cpu = device.type == "cpu" and training.compile is True
    short = model.max_seq_len <= LONGEST_BY_MATMULS
    # By rule: `choose_attention` measures in eager mode.
    if training.attention == "auto" and compiled_on_cpu and short:
        return AttentionChoice("matmul", "compiled, faster than PyTorch's kernel for CPUs")
    shape = AttentionShape(
        batch_size=training.batch_size,
        seq_len=model.max_seq_len,
        n_heads=model.n_heads,
        n_kv_heads=model.kv_heads,
        head_dim=model.head_width,
        dtype=getattr(torch, training.dtype),
        device=device,
        n_documents=n_documents,
    )
    return choose_attention(shape, training.attention)


def build_operators(config: Config, device: torch.device, attention: str) -> Operators:
    """The operators of the model, with the attention backend of this name.

    Raises:
        ValueError: `training.kernels` or the backend cannot run here.
    """
    operators = _choose_operators(config.training, device)
    if operators is TRITON and config.training.save_projection_inputs:
        operators = TRITON_SAVING
    return dataclasses.replace(operators, attention=attention_operator(attention))


def _choose_operators(training: TrainingConfig, device: torch.device) -> Operators:
    """The set that `training.kernels` means on `device`."""
    if training.kernels == "auto":
        if device.type == "cuda":
            return TRITON
        return CPU if training.compile is True else REFERENCE
    # The interpreter runs them anywhere, but far too slowly for more than a test.
    if training.kernels == "triton" and device.type != "cuda" and not knobs.runtime.interpret:
        raise ValueError(
            f"training.kernels = triton needs a CUDA device, and training is on {device.type}; "
            "use auto, cpu or reference."
        )
    return {"triton": TRITON, "cpu": CPU, "reference": REFERENCE}[training.kernels]
