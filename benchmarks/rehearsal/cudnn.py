"""cuDNN's attention on the null device.

cuDNN plans with a device at hand, and is no library of a few functions. So its two operators are
replaced, in Python: each allocates its results, and launches nothing.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, library
from torch._subclasses.fake_tensor import FakeTensorMode

OPERATORS = (
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_cudnn_attention_backward",
)
_ATEN = library.Library("aten", "IMPL")


def replace_operators() -> None:
    """Replace both operators for CUDA tensors, in this process."""
    for name in OPERATORS:
        _ATEN.impl(name, _allocating(getattr(torch.ops.aten, name).default), "CUDA")


def _allocating(operator: Any) -> Callable[..., tuple[Any, ...]]:
    """An operator that returns empty tensors with the shapes, strides and types of `operator`."""

    def allocate(*arguments: Any, **options: Any) -> tuple[Any, ...]:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:

            def fake(x: Any) -> Any:
                return mode.from_tensor(x) if isinstance(x, Tensor) else x

            results = operator(
                *map(fake, arguments), **{key: fake(value) for key, value in options.items()}
            )
        return tuple(
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
            if isinstance(x, Tensor)
            else x
            for x in results
        )

    return allocate
