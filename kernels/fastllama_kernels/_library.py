"""Registers kernel launchers as `torch.ops.fastllama.*`; torch.compile sees one node for each.

The nodes are opaque to Inductor. Inductor would specialise a Triton kernel again, turn Python
floats into float64, and fail to compile on a machine without a GPU.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, library
from torch.utils._python_dispatch import _get_current_dispatch_mode
from triton import knobs

# `triton.jit` reads this when it decorates a kernel; a later change has no effect.
INTERPRETED: bool = knobs.runtime.interpret

_LIBRARY = library.Library("fastllama", "DEF")

Launcher = Callable[..., Any]


def register(
    schema: str, fake: Launcher, *, uses_triton: bool = True
) -> Callable[[Launcher], Launcher]:
    """Register the decorated launcher as torch.ops.fastllama.<name in `schema`>.

    Args:
        schema: name, arguments and results. `(a!)` marks a first argument that is written to.
        fake: returns empty results with the right shapes, dtypes and strides.
        uses_triton: whether the operator runs on CUDA devices only.

    Returns:
        A decorator that returns the operator. An operator of Triton kernels raises ValueError for
        tensors off CUDA, unless Triton's interpreter is on.
    """
    name = schema.partition("(")[0]
    writes = "(a!)" in schema

    def decorate(launch: Launcher) -> Launcher:
        @wraps(launch)
        def launch_on_device_of(x: Tensor, *arguments: Any, **options: Any) -> Any:
            if writes and not x.is_inference():
                # Autograd then raises an error in a backward that saved x before the write.
                torch.autograd.graph.increment_version(x)
            with _on_device_of(x, name) if uses_triton else nullcontext():
                return launch(x, *arguments, **options)

        _LIBRARY.define(schema)
        _LIBRARY.impl(name, launch_on_device_of, "CompositeExplicitAutograd")
        library.register_fake(f"fastllama::{name}", fake, lib=_LIBRARY)
        operator: Launcher = getattr(torch.ops.fastllama, name).default
        return operator

    return decorate


def _on_device_of(x: Tensor, name: str) -> AbstractContextManager[Any]:
    """Make the device of `x` current: Triton launches on the current device."""
    if x.is_cuda:
        return torch.cuda.device(x.device)
    if not INTERPRETED:
        raise ValueError(
            f"The Triton operator {name} needs tensors on a CUDA device, not on {x.device}; use "
            "the REFERENCE operators there, or set TRITON_INTERPRET=1 before Python starts."
        )
    return nullcontext()


def may_write_to_inputs() -> bool:
    """Whether an operator may write its result into its input.

    False in eager mode under a dispatch mode. Selective activation checkpointing is one: it
    saves results of earlier operators, here the input, and returns them during recomputation.
    torch.compile removes mutations from its graph before it decides what to save.
    """
    return torch.compiler.is_compiling() or _get_current_dispatch_mode() is None


@cache
def n_multiprocessors(device: torch.device) -> int:
    """Number of streaming multiprocessors of a GPU; 1 in the interpreter."""
    if device.type != "cuda":
        return 1
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


@cache
def l2_bytes(device: torch.device) -> int:
    """Size of a GPU's L2 cache in bytes; 0 in the interpreter."""
    if device.type != "cuda":
        return 0
    size: int = torch.cuda.get_device_properties(device).L2_cache_size
    return size
