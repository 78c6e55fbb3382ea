"""Launchers as `torch.ops.fastllama.*`, so that torch.compile sees one opaque node for each.

Opaque, because a Triton kernel that Inductor can see inside is specialised again by Inductor,
which makes Python floats float64, and cannot be compiled where there is no GPU.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, library
from torch.utils._python_dispatch import _get_current_dispatch_mode
from triton import knobs

# A kernel is interpreted or compiled for good when `triton.jit` decorates it.
INTERPRETED: bool = knobs.runtime.interpret

_LIBRARY = library.Library("fastllama", "DEF")

Launcher = Callable[..., Any]


def register(schema: str, fake: Launcher) -> Callable[[Launcher], Launcher]:
    """Register the decorated launcher as torch.ops.fastllama.<name of `schema`>.

    Args:
        schema: name, arguments and results; where the first is written to, it is declared so.
        fake: makes results of the right shape, dtype and strides without computing.

    Returns:
        A decorator whose result is the operator. Called with tensors off a GPU, outside
        Triton's interpreter, it raises ValueError.
    """
    name = schema.partition("(")[0]
    writes = "(a!)" in schema

    def decorate(launch: Launcher) -> Launcher:
        @wraps(launch)
        def launch_on_device_of(x: Tensor, *arguments: Any, **options: Any) -> Any:
            if writes and not x.is_inference():
                # A backward that saved x finds it changed; nobody else tells autograd.
                torch.autograd.graph.increment_version(x)
            with _on_device_of(x, name):
                return launch(x, *arguments, **options)

        _LIBRARY.define(schema)
        _LIBRARY.impl(name, launch_on_device_of, "CompositeExplicitAutograd")
        library.register_fake(f"fastllama::{name}", fake, lib=_LIBRARY)
        operator: Launcher = getattr(torch.ops.fastllama, name).default
        return operator

    return decorate


def _on_device_of(x: Tensor, name: str) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whichever that of the tensors is."""
    if x.is_cuda:
        return torch.cuda.device(x.device)
    if not INTERPRETED:
        raise ValueError(
            f"The Triton operator {name} needs tensors on a CUDA device, not on {x.device}; use "
            "the REFERENCE operators there, or set TRITON_INTERPRET=1 before Python starts."
        )
    return nullcontext()


def may_write_to_inputs() -> bool:
    """Whether an input may be written to in place of a new result.

    Not under a dispatch mode: that of selective activation checkpointing keeps results, here the
    input, to hand them out again when it recomputes. Of what torch.compile traces there are no
    mutations left by the time anything is kept.
    """
    return torch.compiler.is_compiling() or _get_current_dispatch_mode() is None


@cache
def n_multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 1 in the interpreter."""
    if device.type != "cuda":
        return 1
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count
