"""Memory layouts of the same numbers. A tensor with too few dimensions stays unchanged."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

Layout = Callable[[Tensor], Tensor]


def contiguous(x: Tensor) -> Tensor:
    """A contiguous copy."""
    return x.clone(memory_format=torch.contiguous_format)


def transposed(x: Tensor) -> Tensor:
    """The last dimension outermost."""
    return x.movedim(-1, 0).contiguous().movedim(0, -1) if x.ndim else x


def swapped(x: Tensor, first: int) -> Tensor:
    """Dimension `first + 1` outside of `first`."""
    if x.ndim < first + 2:
        return x
    return x.transpose(first, first + 1).contiguous().transpose(first, first + 1)


def every_other(x: Tensor) -> Tensor:
    """A stride of 2 in the last dimension; filler in between."""
    return torch.stack([x, torch.full_like(x, filler(x))], dim=-1)[..., 0]


def sliced(x: Tensor) -> Tensor:
    """Columns of a wider tensor, filler on both sides."""
    return F.pad(x, (1, 2), value=filler(x))[..., 1:-2] if x.ndim else x


def expanded(x: Tensor, *dims: int) -> Tensor:
    """The first entry along each of `dims` everywhere: a stride of 0."""
    first = x
    for dim in dims:
        if dim < x.ndim:
            first = first.narrow(dim, 0, 1)
    return first.expand_as(x)


def misaligned(x: Tensor) -> Tensor:
    """Contiguous, but aligned to one element only; filler on both sides."""
    edge = x.new_full((1,), filler(x))
    return torch.cat([edge, x.flatten(), edge])[1:-1].view(x.shape)


def filler(x: Tensor) -> float:
    """A value between the elements, which no kernel may read."""
    return math.nan if x.is_floating_point() else -1


EXPANDED: dict[str, Layout] = {
    "expanded_0": lambda x: expanded(x, 0),
    "expanded_1": lambda x: expanded(x, 1),
    "expanded_2": lambda x: expanded(x, 2),
    "expanded_all": lambda x: expanded(x, *range(x.ndim)),
}

STRIDED: dict[str, Layout] = {
    "transposed": transposed,
    "swapped_01": partial(swapped, first=0),
    "swapped_12": partial(swapped, first=1),
    "every_other": every_other,
    "sliced": sliced,
    "expanded_0": EXPANDED["expanded_0"],
}
