"""What an update changes, and what a checkpoint therefore holds."""

from dataclasses import dataclass
from typing import Any

import torch

from fastllama.checkpoint import Progress, training_tensors
from fastllama.model import Llama
from fastllama.spikes import SpikeDetector


@dataclass
class TrainState:
    """Weights, moments, and how far the run has come."""

    model: Llama
    optimizer: torch.optim.AdamW
    progress: Progress
    spikes: SpikeDetector | None
    """What updates are judged by, where spikes are refused."""

    def tensors(self) -> dict[str, Any]:
        """Weights and moments by checkpoint name; the values are the live tensors."""
        return training_tensors(self.model, self.optimizer)
