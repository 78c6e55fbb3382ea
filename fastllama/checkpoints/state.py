"""The state that updates change and checkpoints hold, and its names on disk."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from fastllama.distributed.compute_copies import ComputeCopies
from fastllama.model.llama import Llama
from fastllama.optim.ema import WeightAverage
from fastllama.optim.spikes import SpikeDetector

MODEL, OPTIMIZER, EMA = "model.", "optimizer.", "ema."
"""Prefixes of the names of weights, of AdamW's state and of averaged weights in a checkpoint."""


Count = Annotated[int, Field(ge=0, lt=2**62)]


@dataclass
class TrainProgress:
    """The progress of a run. Resuming needs this, the weights and the moments."""

    # Progress with a field of a newer version cannot be resumed here.
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    step: Count = 0
    """Optimizer updates done, skipped ones included."""
    position: Count = 0
    """Sequences consumed since the run began."""
    skipped_steps: Count = 0
    """Updates skipped because the loss or gradient norm was not finite or was a spike."""
    skipped_in_a_row: Count = 0
    """Skipped updates since the last applied one."""
    spikes: list[float] = field(default_factory=list)
    """`SpikeDetector.state` at the last checkpoint; empty before the first."""

    def __post_init__(self) -> None:
        if len(self.spikes) not in (0, 5):
            raise ValueError(f"spikes must be 0 or 5 numbers, not {len(self.spikes)}")


@dataclass
class TrainState:
    """Weights, moments, average, and progress."""

    model: Llama
    optimizer: torch.optim.AdamW
    progress: TrainProgress
    spikes: SpikeDetector | None
    """Statistics of past updates, where `training.spike_z_score` asks for them."""
    average: WeightAverage | None = None
    """Average of the weights, where `training.ema_decay` asks for it."""
    copies: ComputeCopies | None = None
    """What the model computes with, where one process trains without FSDP2."""

    def computing(self) -> AbstractContextManager[None]:
        """Inside, the model can compute. Under FSDP2 it always can, and gathers what it needs."""
        return nullcontext() if self.copies is None else self.copies.in_place()

    def tensors(self) -> dict[str, Any]:
        """Weights, moments and average by checkpoint name; the values are the live tensors."""
        averages = {} if self.average is None else self.average.tensors
        return training_tensors(self.model, self.optimizer) | {
            f"{EMA}{checkpoint_name(name)}": tensor for name, tensor in averages.items()
        }


def checkpoint_name(parameter: str) -> str:
    """The name of a parameter of `Llama` in a checkpoint.

    Names on disk stay when a module moves. Both norms were modules of the block before.
    """
    return parameter.replace("attention.norm.", "attention_norm.").replace("mlp.norm.", "mlp_norm.")


def model_tensors(model: nn.Module, prefix: str = MODEL) -> dict[str, Tensor]:
    """Weights by checkpoint name; the values are the live tensors.

    With the prefix `EMA` the names are those of the averaged weights.
    """
    return {
        f"{prefix}{checkpoint_name(name)}": parameter.detach()
        for name, parameter in model.named_parameters()
    }


def training_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Weights and AdamW's state by checkpoint name; the values are the live tensors."""
    tensors: dict[str, Any] = model_tensors(model)
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"{OPTIMIZER}{key}.{checkpoint_name(name)}"] = value
    return tensors
