"""Copies of the weights that a single process computes with, where `training.dtype` is narrower."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from fastllama.distributed.fsdp import AUTOGRAD_SUMS


class ComputeCopies:
    """Does for one process what FSDP2 does for several: narrow weights inside, float32 outside.

    There is nothing to gather and nothing to reduce: weights are copied once an update, and each
    gradient is added to its float32 sum in one pass. The sums have the bits that FSDP2 computes in
    one process. Since PyTorch 2.15 there is an exception: FSDP2 rounds the gradient of a tied
    embedding once more.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Find the float32 parameters of `model`, which may share some of them."""
        self._copies: dict[nn.Parameter, nn.Parameter] = {}
        self._places: list[tuple[nn.Module, str, nn.Parameter]] = []
        for module in model.modules():
            for name, weight in module.named_parameters(recurse=False):
                self._places.append((module, name, weight))
                if weight not in self._copies:
                    self._copies[weight] = copy = nn.Parameter(weight.detach().to(dtype))
                    if AUTOGRAD_SUMS:
                        # A gradient that autograd computes in float32 is not rounded.
                        copy.grad_dtype = weight.dtype
                    copy.register_post_accumulate_grad_hook(partial(_add_gradient, weight))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put copies of the weights, as they are now, into the model; take them out at the end.

        A backward inside adds to the gradients of the float32 weights.
        """
        with torch.no_grad():
            torch._foreach_copy_(list(self._copies.values()), list(self._copies))
        for module, name, weight in self._places:
            module._parameters[name] = self._copies[weight]
        try:
            yield
        finally:
            for module, name, weight in self._places:
                module._parameters[name] = weight


@torch.no_grad()
def _add_gradient(weight: nn.Parameter, copy: Tensor) -> None:
    """Move the gradient of a copy to its float32 weight."""
    gradient = copy.grad
    assert gradient is not None
    copy.grad = None
    if weight.grad is None:
        weight.grad = gradient.to(weight.dtype)
    else:
        weight.grad += gradient
