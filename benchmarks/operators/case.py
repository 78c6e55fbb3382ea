"""Description of an operator benchmark: inputs, minimal work, and the providers compared."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastllama.config import ModelConfig

Operator = Callable[..., Tensor | tuple[Tensor, ...]]
Shape = dict[str, int]

PHASES = ("forward", "backward", "both")


@dataclass(frozen=True)
class Work:
    """Minimal work of one phase."""

    bytes: float = 0.0
    """Bytes moved, from the docstring of the kernel, without the operands of matmuls."""
    flops: float = 0.0
    """FLOPs of matmuls."""

    def __add__(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.flops + other.flops)


@dataclass(frozen=True)
class Provider:
    """One implementation of the operator."""

    name: str
    package: str
    """Name of its package on PyPI."""
    make: Callable[[], Operator]
    """Returns the operator. Raises ImportError if the package is not installed."""
    waits_for_host: bool = False
    """Reads a result on the host and therefore cannot be captured in a CUDA graph."""
    phases: tuple[str, ...] = PHASES
    """Phases that can be repeated on the same inputs."""
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    """Supported dtypes."""


@dataclass(frozen=True)
class Benchmark:
    """An operator of the training step."""

    operator: str
    shape: Callable[[ModelConfig, int], Shape]
    """Sizes for a model and a number of tokens, keyed by the letters of the shape legend."""
    inputs: Callable[[Shape, torch.dtype, torch.Generator], tuple[Any, ...]]
    """Arguments of the operator. Tensors that require a gradient are leaves."""
    reference: Operator
    """Reference implementation; in float64 it gives the truth."""
    work: Callable[[Shape, int], Mapping[str, Work]]
    """Work per phase, for a shape and an element size in bytes. Missing phases are not measured."""
    providers: Callable[[Shape, torch.dtype, torch.device], list[Provider]]
    """Providers, the most interesting first."""


def ours(make: Callable[[], Operator]) -> Provider:
    """fastllama's own provider; always the first."""
    return Provider("fastllama", "fastllama", make)


def rows(model: ModelConfig, n_tokens: int) -> Shape:
    """Shape of B sequences of T positions, about `n_tokens` in total."""
    seq_len = min(model.max_seq_len, n_tokens)
    return {"B": n_tokens // seq_len, "T": seq_len}


def randn(generator: torch.Generator, dtype: torch.dtype, *size: int) -> Tensor:
    """A leaf of standard normal numbers on the generator's device."""
    x = torch.randn(size, generator=generator, device=generator.device, dtype=dtype)
    return x.requires_grad_()


def forward_and_backward(forward: Work, backward: Work) -> dict[str, Work]:
    """Work of all phases if `both` is the sum of forward and backward."""
    return {"forward": forward, "backward": backward, "both": forward + backward}
