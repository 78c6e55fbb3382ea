"""Mistakes made on purpose, which the checks must find."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from fastllama.checkpoints.state import TrainState
from fastllama.model.llama import Attention, Block


def reads_the_loss(state: TrainState) -> None:
    """`.item()` in the loop."""

    def read(module: nn.Module, inputs: Any, loss: Tensor) -> None:
        loss.item()

    state.model.register_forward_hook(read)


def copies_a_weight(state: TrainState) -> None:
    """A float32 copy of a weight."""

    def copy(module: Any, inputs: Any) -> None:
        module.mlp.down.weight.float()

    state.model.blocks[0].register_forward_pre_hook(copy)


def copies_queries(state: TrainState) -> None:
    """A contiguous call before attention."""
    for module in state.model.modules():
        if isinstance(module, Attention):
            attend = module.operators.attention

            def contiguous(q: Tensor, *rest: Any, attend: Any = attend, **options: Any) -> Any:
                return attend(q.contiguous(), *rest, **options)

            module.operators = replace(module.operators, attention=contiguous)


def keeps_outputs(state: TrainState) -> None:
    """A buffer kept alive."""
    kept: list[Tensor] = []

    def keep(module: Block, inputs: Any, outputs: tuple[Tensor, ...]) -> None:
        kept.append(outputs[0].detach().clone())

    state.model.blocks[0].register_forward_hook(keep)


def reduces_every_loss(state: TrainState) -> None:
    """A collective per micro-batch."""

    def reduce(module: nn.Module, inputs: Any, loss: Tensor) -> None:
        dist.all_reduce(loss.detach().clone())

    state.model.register_forward_hook(reduce)


MISTAKES: dict[str, Callable[[TrainState], None]] = {
    mistake.__name__: mistake
    for mistake in (
        reads_the_loss,
        copies_a_weight,
        copies_queries,
        keeps_outputs,
        reduces_every_loss,
    )
}
