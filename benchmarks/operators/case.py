"""One operator to measure: its inputs at the shape of a recipe, its work, and who computes it."""

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
    """What one phase has to do at least."""

    bytes: float = 0.0
    """Moved, by the docstring of the kernel; those of matrix products are left out."""
    flops: float = 0.0
    """Of matrix products."""

    def __add__(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.flops + other.flops)


@dataclass(frozen=True)
class Provider:
    """One who computes the operator."""

    name: str
    package: str
    """Distribution it comes in, by the name pip knows."""
    make: Callable[[], Operator]
    """Imports what it needs; ImportError where that is not installed."""
    waits_for_host: bool = False
    """Reads a result on the host, so that no CUDA graph can hold it."""
    phases: tuple[str, ...] = PHASES
    """Those that can be repeated on the same inputs."""
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    """Element types it can train in."""


@dataclass(frozen=True)
class Benchmark:
    """An operator of the training step."""

    operator: str
    shape: Callable[[ModelConfig, int], Shape]
    """Sizes at a recipe's model and a number of tokens, by the letters of the legend."""
    inputs: Callable[[Shape, torch.dtype, torch.Generator], tuple[Any, ...]]
    """Arguments; the tensors that want a gradient are its leaves."""
    reference: Operator
    """The definition, run in float64 for the truth."""
    work: Callable[[Shape, int], Mapping[str, Work]]
    """By phase, for a shape and the bytes of an element; a phase left out is not measured."""
    providers: Callable[[Shape, torch.dtype, torch.device], list[Provider]]
    """In the order of their interest."""


def ours(make: Callable[[], Operator]) -> Provider:
    """What is measured against all others, and comes first."""
    return Provider("fastllama", "fastllama", make)


def rows(model: ModelConfig, n_tokens: int) -> Shape:
    """B sequences of T that are about `n_tokens` in all."""
    seq_len = min(model.max_seq_len, n_tokens)
    return {"B": n_tokens // seq_len, "T": seq_len}


def randn(generator: torch.Generator, dtype: torch.dtype, *size: int) -> Tensor:
    """A leaf of normal numbers on the generator's device."""
    x = torch.randn(size, generator=generator, device=generator.device, dtype=dtype)
    return x.requires_grad_()


def forward_and_backward(forward: Work, backward: Work) -> dict[str, Work]:
    """The work of all phases where both is one after the other."""
    return {"forward": forward, "backward": backward, "both": forward + backward}
