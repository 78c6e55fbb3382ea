"""An exponential moving average of the weights, on the device and sharded like them."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class WeightAverage:
    """Float32 averages of all parameters of a model, by name."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Start with the weights as they are. `decay` is the share that an update keeps."""
        self._decay = decay
        self._weights = list(model.parameters())
        self.tensors: dict[str, Tensor] = {
            name: weight.detach().clone() for name, weight in model.named_parameters()
        }

    @torch.no_grad()
    def restart(self) -> None:
        """Start again with the weights as they are."""
        for average, weight in zip(self.tensors.values(), self._weights, strict=True):
            average.copy_(weight)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Average the weights after update `step`, counted from 1, in: a = d a + (1 - d) w.

        d is the decay, or (1 + step) / (10 + step) while it is smaller, so that the average forgets
        the initial weights sooner (as in TensorFlow's `ExponentialMovingAverage`). Nothing waits
        for the device. A skipped update counts as one that changed nothing.
        """
        decay = min(self._decay, (1 + step) / (10 + step))
        averages = [_local(tensor) for tensor in self.tensors.values()]
        torch._foreach_lerp_(averages, [_local(weight) for weight in self._weights], 1 - decay)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
