"""Child processes that start at once: forks of a server that has imported everything.

On a GPU machine a process takes ten seconds to import PyTorch, its compiler and the peers. The GPU
suite has a process for each part and each contender. The server is that of `multiprocessing`: it
starts with the first fork of a process, and ends with this process. It never runs anything, so a
fork inherits nothing but imports.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PRELOADED = "benchmarks.preloaded"
TERMINATION_SECONDS = 5.0
"""Time for a fork that is told to end, to stop children of its own."""


def run_forked(
    target: Callable[..., object], arguments: tuple[Any, ...], log: Path, timeout: float
) -> int | None:
    """Call target(*arguments) in a fork and return its exit code: minus the signal that killed it.

    After `timeout` seconds, SIGTERM is followed by SIGKILL, and None is returned. Whatever the fork
    leaves running in its session is killed, unless it is in a session of its own. `log` receives
    all output. `target` has to be a function of a module, `arguments` go through pickle.
    """
    # Otherwise PyTorch asks the driver whether there is a GPU, and after that no fork can use one.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOADED])
    process = context.Process(target=_call, args=(target, arguments, log))
    process.start()
    try:
        process.join(timeout)
        return process.exitcode
    finally:
        if process.exitcode is None:
            process.terminate()
            process.join(TERMINATION_SECONDS)
        assert process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()


def _call(target: Callable[..., object], arguments: tuple[Any, ...], log: Path) -> None:
    """In the fork: a session and a log of its own, and SIGTERM runs its `finally` blocks."""
    os.setsid()
    with log.open("a") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    target(*arguments)
