"""What an update changes, and what a checkpoint therefore holds."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastllama.model.llama import Llama
from fastllama.optim.spikes import SpikeDetector

MODEL = "model."
"""What the names of the weights begin with in a checkpoint."""


@dataclass
class TrainProgress:
    """How far a run has come; with the weights and moments, all a resumed run needs."""

    step: int = 0
    """Optimizer updates done, refused ones included."""
    position: int = 0
    """Sequences consumed since the run began."""
    skipped_steps: int = 0
    """Updates refused because loss or gradient norm was not finite or a spike."""
    skipped_in_a_row: int = 0
    """Refused updates since the last good one."""
    spikes: list[float] = field(default_factory=list)
    """`fastllama.optim.spikes.SpikeDetector.state`, as of a checkpoint; empty before any."""


@dataclass
class TrainState:
    """Weights, moments, and how far the run has come."""

    model: Llama
    optimizer: torch.optim.AdamW
    progress: TrainProgress
    spikes: SpikeDetector | None
    """What updates are judged by, where spikes are refused."""

    def tensors(self) -> dict[str, Any]:
        """Weights and moments by checkpoint name; the values are the live tensors."""
        return training_tensors(self.model, self.optimizer)


def model_tensors(model: nn.Module) -> dict[str, Any]:
    """The weights by the names they have in a checkpoint; the values are the live tensors."""
    return {f"{MODEL}{name}": parameter.detach() for name, parameter in model.named_parameters()}


def training_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Weights and AdamW's state by checkpoint name; the values are the live tensors."""
    tensors = model_tensors(model)
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = value
    return tensors
