"""A rank that fails among several. It speaks at once; ranks that fail because of it speak after it.

The sentence comes before everything that may block: a checkpoint that is being written, leaving the
process group, the end of the interpreter. Otherwise the ranks that wait in a collective would time
out first, and the launcher would end the culprit before it has said anything.
"""

import json
import os
import queue
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from torch.distributed.distributed_c10d import _abort_process_group, _get_default_store

from fastllama.distributed.failure_reports import (
    PEER_SECONDS_LATER,
    report_failure,
    report_first_failure,
    words_of,
)
from fastllama.errors import PeerFailedError, RankFailedError

STORE_SECONDS = 2.0
"""Time for the store to answer. The process that hosts it may hang."""
PEER_SECONDS = 2.0
"""Time for the culprit to speak, and to exit first, so that the launcher blames it."""
ABORT_SECONDS = 5.0
"""Time for aborting the process group. NCCL itself would wait as long as for a collective."""

GONE = "is gone"
"""Why a rank failed whose process ended without a word, for example by SIGKILL."""

_KEY = "fastllama/first-failure"


@contextmanager
def failures_told(rank: int, size: int, pids: Mapping[int, int]) -> Iterator[None]:
    """Report a failure of this rank inside, before anything outside can block.

    The rank that fails first speaks at once. A rank that fails after it, or because it lost a peer,
    speaks after it and names it. `pids` are the processes of the ranks on this node. A run of one
    process raises its errors unchanged.

    Raises:
        RankFailedError: this rank failed before any other; the cause is the error.
        PeerFailedError: this rank failed after another one; the cause is the error.
    """
    try:
        yield
    except (RankFailedError, PeerFailedError):
        raise  # told further inside
    except (Exception, SystemExit) as error:
        if size == 1:
            raise
        if _is_first(rank, error, pids):
            raise RankFailedError(rank) from error
        raise PeerFailedError(rank) from error


def _is_first(rank: int, error: BaseException, pids: Mapping[int, int]) -> bool:
    """Report the failure of this rank; return whether it was the first."""
    words = words_of(error)
    # A rank that lost a peer is not the culprit, unless no other turns up.
    lost_a_peer = isinstance(error, dist.DistError) or "gloo" in words
    culprit, why = (None, "") if lost_a_peer else _first_failure(rank, words)
    if culprit != rank:
        with _sigterm_wakes() as woken:
            deadline = time.monotonic() + PEER_SECONDS
            gone = _await_gone(pids, woken, deadline)
            if culprit is None:
                claim = (rank, words) if gone is None else (gone, GONE)
                culprit, why = _first_failure(*claim)
            if culprit != rank:
                _report_after(culprit, why, rank, words)
                woken.wait(max(0.0, deadline - time.monotonic()))
                return False
    report_first_failure(rank, error)
    return True


def _report_after(culprit: int, why: str, rank: int, words: str) -> None:
    if why == GONE:
        report_failure(
            f"rank {culprit} {GONE}, and rank {rank} failed without it: {words}",
            PEER_SECONDS_LATER,
        )
    # Every rank makes the same mistake, and one sentence says it.
    elif why != words:
        report_failure(f"rank {rank} failed after rank {culprit}: {words}", PEER_SECONDS_LATER)


def _first_failure(rank: int, words: str) -> tuple[int, str]:
    """The rank that failed first, and why: these, unless the store has others from earlier."""
    answers: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def ask() -> None:
        try:
            claim = json.dumps([rank, words])
            answers.put(_get_default_store().compare_set(_KEY, "", claim))
        except RuntimeError:
            answers.put(None)  # The process that hosts the store has exited.

    threading.Thread(target=ask, name="first failure", daemon=True).start()
    try:
        answer = answers.get(timeout=STORE_SECONDS)
    except queue.Empty:
        answer = None
    if answer is None:
        return rank, words
    first, why = json.loads(answer)
    return first, why


def pids_of_node() -> dict[int, int]:
    """The process id of each rank that this process can see. Every rank calls it."""
    processes: list[tuple[str, int]] = [("", 0)] * dist.get_world_size()
    here = _process_table()
    dist.all_gather_object(processes, (here, os.getpid()))
    return {rank: pid for rank, (table, pid) in enumerate(processes) if here and table == here}


def _process_table() -> str:
    """Names the table that holds the id of this process; empty where there is no /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        return boot + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _await_gone(pids: Mapping[int, int], woken: threading.Event, deadline: float) -> int | None:
    """Wait for a rank of this node to be gone; None if `woken` or `deadline` come first."""
    while True:
        last_look = woken.wait(0.02) or time.monotonic() > deadline
        for rank, pid in pids.items():
            if _is_gone(pid):
                return rank
        if last_look:
            return None


def _is_gone(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    # The state follows the name, which is in parentheses and may contain some. A zombie has ended.
    return status.rpartition(")")[2].split()[0] in "ZX"


@contextmanager
def _sigterm_wakes() -> Iterator[threading.Event]:
    """Inside, SIGTERM sets an event. A launcher sends it once it has seen the culprit exit."""
    woken = threading.Event()
    previous = signal.signal(signal.SIGTERM, lambda number, frame: woken.set())
    try:
        yield woken
    finally:
        signal.signal(signal.SIGTERM, previous)


def abort_process_group() -> None:
    """Leave the process group without waiting for its other ranks, which may sit in a collective.

    `destroy_process_group` would wait for them, and they for this rank.
    """
    thread = threading.Thread(target=_abort_process_group, name="abort", daemon=True)
    thread.start()
    thread.join(ABORT_SECONDS)
