"""torch.compile: which modules are compiled, the first update's timeout, and later graphs."""

import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from rich.console import Console
from torch._dynamo import config as dynamo
from torch._dynamo.utils import counters
from torch._functorch import config as functorch
from torch._inductor import cpu_vec_isa

from fastllama.config import Config
from fastllama.distributed.world import World
from fastllama.errors import SideJobFailedError
from fastllama.model.llama import Llama

FIRST_UPDATE_MINUTES = 60.0
"""Timeout of a collective while graphs are compiled.

Each process compiles by itself, in the forward between two gathers, so all processes wait for the
slowest. Compiling in one process first would not be faster: under FSDP2 no process can run a
forward alone. It would have to compile a copy of the model without FSDP2's hooks, and the graphs
might differ.
"""


def missing_compiler() -> str | None:
    """The name of the C++ compiler that torch.compile needs on a CPU, if it is missing."""
    compiler = os.environ.get("CXX", "g++")
    return compiler if shutil.which(compiler) is None else None


def refuse_missing_compiler() -> None:
    """Raise ValueError if the C++ compiler that torch.compile needs on a CPU is missing."""
    if compiler := missing_compiler():
        raise ValueError(
            f"torch.compile needs a C++ compiler, and {compiler} is missing; install it, name "
            "another in the environment variable CXX, or train with --training.compile false."
        )


def compile_model(model: Llama, config: Config) -> None:
    """Compile the blocks or the whole model, as `training.compile_scope` says, at the first call.

    Groups of `shard_model` are gathered between graphs. The blocks make two graphs: one of the
    first block and one of all others. Final norm and loss are compiled as well, but with the scope
    "block" not where they are Triton kernels. In plain PyTorch the loss makes many passes over the
    logits.

    A second start takes its graphs from torch.compile's cache on disk.
    """
    # Inductor adds the gradients of equal tokens with atomics, in the order that threads come.
    model.embedding.forward = torch.compiler.disable(  # type: ignore[method-assign]
        model.embedding.forward
    )
    # Off by itself: PyTorch does not cache a graph with a torch.autograd.Function, which may do
    # anything. The operators' functions are traced into the graph, and so into its key.
    functorch.autograd_cache_allow_custom_autograd_functions = True
    # Of each shape, a block has four graphs: the first block and all others, in training and in
    # validation. PyTorch's limit of 8 would leave a third shape eager. Shapes are those of stages,
    # with up to 8 lengths of `cu_seqlens`.
    n_shapes = len(config.stages) * (8 if config.data.document_mask else 1)
    if n_shapes > 1:
        dynamo.recompile_limit = max(dynamo.recompile_limit, 4 * n_shapes)
    modules = [model] if config.training.compile_scope == "model" else [*model.blocks]
    has_kernels = model.output.operators.name.startswith("triton")
    if config.training.compile_scope == "block" and not has_kernels:
        modules += [model.norm, model.output]
    for module in modules:
        module.compile(dynamic=False)


def probe_vector_instructions() -> None:
    """Begin to find out, in a thread, which vector instructions compiled code may use on this CPU.

    Inductor asks several processes, one after the other, and remembers the answer. It asks when it
    has the first graph; until then the main thread traces the model.
    """
    threading.Thread(target=cpu_vec_isa.valid_vec_isa_list, daemon=True).start()


class CompileWatch:
    """Extends the timeout while graphs are compiled, and reports graphs that are compiled later."""

    def __init__(self, config: Config, world: World, console: Console, began: float) -> None:
        """`began` is the start of the run, by time.perf_counter."""
        self._config, self._world, self._console, self._began = config, world, console, began
        self._n_before = n_compiled_graphs()
        self._warm = False
        self._validated = False

    @contextmanager
    def update(self, step: int) -> Iterator[None]:
        """Wrap one update; every process calls it."""
        before = n_compiled_graphs()
        with nullcontext() if self._warm else self._compiling():
            yield
        now = n_compiled_graphs()
        compiled = now - before
        if not self._warm:
            self._warm = True
            # With those of the warm-up.
            self._tell_first_update(now - self._n_before)
        elif compiled:
            self._tell(
                f"step {step}: torch.compile made {compiled} more graphs. This slows training, and "
                "should not happen after the first update; TORCH_LOGS=recompiles shows the reason."
            )

    @contextmanager
    def validation(self) -> Iterator[None]:
        """Wrap one validation; every process calls it. The first compiles graphs of its own."""
        with nullcontext() if self._validated else self._compiling():
            yield
        self._validated = True

    @contextmanager
    def warm_up(self) -> Iterator[None]:
        """Wrap work before the first update that compiles graphs; every process calls it."""
        with self._compiling():
            yield

    @contextmanager
    def _compiling(self) -> Iterator[None]:
        """Extend the timeout of collectives for work that compiles graphs."""
        if not self._config.training.compile:
            yield
            return
        asked = self._config.parallel.timeout_minutes
        self._world.set_timeout(max(FIRST_UPDATE_MINUTES, asked))
        try:
            yield
        except SideJobFailedError:
            # Every rank has failed, and goes on. Any other error may be one rank's alone, and the
            # others do not come to the barrier of `set_timeout`.
            self._world.set_timeout(asked)
            raise
        if self._world.device.type == "cuda":
            torch.cuda.synchronize()
        self._world.set_timeout(asked)

    def _tell_first_update(self, compiled: int) -> None:
        if self._world.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._began
        graphs = f", {compiled} graphs compiled" if self._config.training.compile else ""
        self._tell(f"first update done {seconds:.1f} s after the start{graphs}")

    def _tell(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)


def n_compiled_graphs() -> int:
    """Number of graphs that this process has compiled."""
    return int(counters["stats"]["unique_graphs"])
