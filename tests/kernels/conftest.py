"""Fixtures of the kernel tests: one thread, rounding, memory that holds NaN until it is written."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from torch.utils._device import _device_constructors
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

# More elements than a block, so that a write out of bounds lands in the fence.
FENCE = 40_000


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """For tensors this small a second thread costs more time than it saves."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(autouse=True, scope="session")
def rounded_bfloat16() -> None:
    """Round to bfloat16 as a GPU does, where Triton's interpreter would truncate."""
    cast = InterpreterBuilder.cast_impl

    def rounding_cast(builder: Any, source: Any, target: Any) -> Any:
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return cast(builder, source, target)
        rounded = torch.from_numpy(np.asarray(source.data)).bfloat16()
        return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)

    InterpreterBuilder.cast_impl = rounding_cast


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that Python code allocates holds NaN until a kernel writes to it."""

    def poisoned(x: Tensor) -> Tensor:
        # PyTorch's own code allocates leaves as well.
        x.detach().fill_(math.nan)
        return x

    replace_allocations(monkeypatch, poisoned)


@pytest.fixture
def fences(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Poisoned memory, each allocation between two fences of 64.0; returns the fences."""
    fences: list[Tensor] = []

    def fenced(x: Tensor) -> Tensor:
        size = x.numel() + 2 * FENCE
        memory = torch.full((size,), 64.0, dtype=x.dtype, device=x.device)
        fences.extend((memory[:FENCE], memory[-FENCE:]))
        return memory[FENCE:-FENCE].view(x.shape).fill_(math.nan)

    replace_allocations(monkeypatch, fenced)
    return fences


def replace_allocations(
    monkeypatch: pytest.MonkeyPatch, replace: Callable[[Tensor], Tensor]
) -> None:
    # PyTorch lists the functions of `with torch.device(…)` once, and would list the replacements.
    _device_constructors()

    def replaced(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_and_replace(*arguments: object, **options: object) -> Tensor:
            x = allocate(*arguments, **options)
            return replace(x) if x.is_floating_point() else x

        return allocate_and_replace

    for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty_like"), (torch, "empty")):
        monkeypatch.setattr(owner, name, replaced(getattr(owner, name)))
