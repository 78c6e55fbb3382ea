"""The set of operators a model is built on: one value, chosen once, handed to the model.

An ablation is `dataclasses.replace(TRITON, rope=REFERENCE.rope)`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fastllama_kernels.attention import attention_reference
from fastllama_kernels.attention_backends import sdpa_attention
from fastllama_kernels.cross_entropy import cross_entropy, cross_entropy_reference
from fastllama_kernels.linear_cross_entropy import (
    linear_cross_entropy,
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
    swiglu_linear,
    swiglu_linear_reference,
    swiglu_reference,
)


@dataclass(frozen=True)
class Operators:
    """One implementation of every operator of the training step.

    Each has the signature and the meaning of the `<op>_reference` in the file of its name.
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
    linear_cross_entropy: Callable[..., Tensor]


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
"""Plain PyTorch on any device and in any float type: the definition the others are held to."""

TRITON = Operators(
    name="triton",
    rms_norm=rms_norm,
    add_rms_norm=add_rms_norm,
    add_rms_norm_linear=add_rms_norm_linear,
    rope=rope,
    attention=sdpa_attention,
    swiglu=swiglu,
    swiglu_linear=swiglu_linear,
    cross_entropy=cross_entropy,
    linear_cross_entropy=linear_cross_entropy,
)
"""Triton kernels, on CUDA devices or in Triton's interpreter; attention is PyTorch's own until
`attention_operator` replaces it by the fastest there is."""
