"""Launches ranks in a fraction of a second: forks them from a parent that has imported PyTorch.

A fork copies only one thread. Import this in a script that has started no threads, not in pytest.
"""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch.distributed.checkpoint  # noqa: F401

import fastllama.checkpoints.writing
import fastllama.cli
import fastllama.data.prepare
import fastllama.train

GRACE_SECONDS = 1.0
"""Time for the other ranks to exit by themselves after one has failed; then they are killed."""
LIMIT_SECONDS = 60.0
"""Time for a launch; then all ranks are killed."""


@dataclass(frozen=True)
class Outcome:
    """How a launch ended."""

    codes: tuple[int, ...]
    """Exit code of each rank; negative for a signal."""
    printed: str
    """stdout and stderr of all ranks."""


def launch(
    world_size: int,
    arguments: Sequence[str | Path],
    log: Path,
    prepare: Callable[[int], None] = lambda rank: None,
    kill_after: float | None = None,
) -> Outcome:
    """Run `fastllama ARGUMENTS` as `world_size` ranks, each after `prepare(rank)`.

    The ranks share an operating-system process group, so that one signal reaches all. They are
    killed after `kill_after` seconds, and `GRACE_SECONDS` after one of them fails.
    """
    with socket.socket() as free_socket:
        free_socket.bind(("127.0.0.1", 0))
        port = free_socket.getsockname()[1]
    sys.stdout.flush()
    ranks: list[int] = []
    for rank in range(world_size):
        child = os.fork()
        if child == 0:
            os.setpgid(0, ranks[0] if ranks else 0)
            _run_rank(rank, world_size, port, arguments, log, prepare)
        ranks.append(child)
        os.setpgid(child, ranks[0])
    codes = _wait(ranks, kill_after)
    return Outcome(codes, log.read_text(errors="replace"))


def _run_rank(
    rank: int,
    world_size: int,
    port: int,
    arguments: Sequence[str | Path],
    log: Path,
    prepare: Callable[[int], None],
) -> None:
    code = 70
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        prepare(rank)
        fastllama.cli.main([str(argument) for argument in arguments])
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # os._exit, because sys.exit would run the parent's exit handlers in the child.
        os._exit(code)


def _wait(ranks: list[int], kill_after: float | None) -> tuple[int, ...]:
    codes: dict[int, int] = {}
    deadline = time.monotonic() + (LIMIT_SECONDS if kill_after is None else kill_after)
    while len(codes) < len(ranks):
        for rank in ranks:
            if rank not in codes:
                done, status = os.waitpid(rank, os.WNOHANG)
                if done:
                    codes[rank] = os.waitstatus_to_exitcode(status)
                    if codes[rank]:
                        deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if time.monotonic() > deadline:
            for rank in ranks:
                if rank not in codes:
                    os.kill(rank, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.005)
    return tuple(codes[rank] for rank in ranks)


def forked(compute: Callable[[], object]) -> None:
    """Call `compute` in a child process, so that the parent stays without threads.

    Raises:
        RuntimeError: `compute` failed.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            compute()
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise RuntimeError(f"{compute} failed")
