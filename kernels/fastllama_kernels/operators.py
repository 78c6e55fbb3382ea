"""Sets of operators. A model takes one set and calls every operator through it.

For an ablation, replace one operator: `dataclasses.replace(TRITON, rope=REFERENCE.rope)`.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from fastllama_kernels.attention import attention, attention_by_matmuls, attention_reference
from fastllama_kernels.cross_entropy import cross_entropy, cross_entropy_reference
from fastllama_kernels.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_cpu,
    linear_cross_entropy_reference,
)
from fastllama_kernels.rms_norm import (
    add_rms_norm,
    add_rms_norm_linear,
    add_rms_norm_linear_reference,
    add_rms_norm_reference,
    rms_norm,
    rms_norm_reference,
)
from fastllama_kernels.rope import rope, rope_reference
from fastllama_kernels.swiglu import (
    swiglu,
    swiglu_cpu,
    swiglu_linear,
    swiglu_linear_cpu,
    swiglu_linear_reference,
    swiglu_reference,
)


@dataclass(frozen=True)
class Operators:
    """One implementation of every operator of the training step.

    Each has the signature of `<operator>_reference` in its file and computes the same result.
    """

    name: str
    rms_norm: Callable[..., Tensor]
    add_rms_norm: Callable[..., tuple[Tensor, Tensor]]
    add_rms_norm_linear: Callable[..., tuple[Tensor, Tensor]]
    rope: Callable[..., tuple[Tensor, Tensor, Tensor]]
    attention: Callable[..., Tensor]
    swiglu: Callable[..., Tensor]
    swiglu_linear: Callable[..., Tensor]
    cross_entropy: Callable[..., tuple[Tensor, Tensor]]
    linear_cross_entropy: Callable[..., Any]


REFERENCE = Operators(
    name="reference",
    rms_norm=rms_norm_reference,
    add_rms_norm=add_rms_norm_reference,
    add_rms_norm_linear=add_rms_norm_linear_reference,
    rope=rope_reference,
    attention=attention_reference,
    swiglu=swiglu_reference,
    swiglu_linear=swiglu_linear_reference,
    cross_entropy=cross_entropy_reference,
    linear_cross_entropy=linear_cross_entropy_reference,
)
"""Plain PyTorch on any device, in any float dtype: the definition of every operator."""

CPU = dataclasses.replace(
    REFERENCE,
    name="cpu",
    attention=attention_by_matmuls,
    swiglu=swiglu_cpu,
    swiglu_linear=swiglu_linear_cpu,
    linear_cross_entropy=linear_cross_entropy_cpu,
)
"""Plain PyTorch on any device, arranged for torch.compile on a CPU, which fuses the rest."""

TRITON = Operators(
    name="triton",
    rms_norm=rms_norm,
    add_rms_norm=add_rms_norm,
    add_rms_norm_linear=add_rms_norm_linear,
    rope=rope,
    attention=attention,
    swiglu=swiglu,
    swiglu_linear=swiglu_linear,
    cross_entropy=cross_entropy,
    linear_cross_entropy=linear_cross_entropy,
)
"""Triton kernels, on CUDA devices or in Triton's interpreter. Attention is PyTorch's SDPA;
training replaces it by the backend that `choose_attention` names."""

TRITON_SAVING = dataclasses.replace(
    TRITON,
    name="triton, saving the inputs of projections",
    add_rms_norm_linear=partial(add_rms_norm_linear, save_y=True),
    swiglu_linear=partial(swiglu_linear, save_h=True),
)
"""`TRITON` without recomputing: more memory, fewer bytes moved, the same bits."""
