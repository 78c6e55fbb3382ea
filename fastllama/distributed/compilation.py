"""torch.compile: what is one graph, how long the first update may take, and what may follow it."""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from rich.console import Console
from torch._dynamo.utils import counters

from fastllama.config import Config
from fastllama.distributed.world import World
from fastllama.model.llama import Llama

FIRST_UPDATE_MINUTES = 60.0
"""How long a collective may wait while graphs are compiled.

Each process compiles on its own, in the forward between two gathers, and the one with the emptiest
cache and the busiest host keeps all others waiting there. Having one process compile first and
the others load its graphs would not be shorter: under FSDP2 no process can run a forward alone, so
it would have to compile a copy of the model that differs in all that FSDP2 adds, in the hope of the
same graphs. Those that compile at the same time are done when the slowest is.
"""


def refuse_missing_compiler() -> None:
    """Raise ValueError if torch.compile would not find the compiler it builds with on a CPU."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise ValueError(
            f"torch.compile needs a C++ compiler, and there is no {compiler}; install one, name it "
            "in the environment variable CXX, or train with --training.compile false."
        )


def compile_model(model: Llama, config: Config) -> None:
    """Have what `training.compile_scope` names compiled at its first call.

    FSDP2 gathers between graphs in either case; the scope "model" adds those of embedding, final
    norm and loss to the two of the blocks, that of the first and that of all others.
    """
    for module in [model] if config.training.compile_scope == "model" else model.blocks:
        module.compile(dynamic=False)


class CompileWatch:
    """Gives the first update the time that compiling takes, and tells of graphs compiled later."""

    def __init__(self, config: Config, world: World, console: Console, began: float) -> None:
        """`began` is when the run did, by time.perf_counter."""
        self._config, self._world, self._console, self._began = config, world, console, began
        self._warm = False

    @contextmanager
    def update(self, step: int) -> Iterator[None]:
        """Around each update; every process calls it."""
        before = n_compiled_graphs()
        if not self._warm and self._config.training.compile:
            asked = self._config.parallel.timeout_minutes
            self._world.set_timeout(max(FIRST_UPDATE_MINUTES, asked))
        yield
        compiled = n_compiled_graphs() - before
        if not self._warm:
            self._warm = True
            self._tell_first_update(compiled)
        elif compiled:
            self._tell(
                f"step {step}: torch.compile made {compiled} more graphs, which is a mistake after "
                "the first update and slows training down; TORCH_LOGS=recompiles tells why."
            )

    def _tell_first_update(self, compiled: int) -> None:
        if self._world.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._began
        graphs = f", {compiled} graphs compiled" if self._config.training.compile else ""
        self._tell(f"first update done {seconds:.1f} s after the start{graphs}")
        if self._config.training.compile:
            self._world.set_timeout(self._config.parallel.timeout_minutes)

    def _tell(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)


def n_compiled_graphs() -> int:
    """Graphs this process has compiled so far."""
    return int(counters["stats"]["unique_graphs"])
