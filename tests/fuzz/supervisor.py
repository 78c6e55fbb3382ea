"""Processes that run cases: they are replaced when they hang or crash."""

import multiprocessing
import time
from collections import Counter
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.fuzz.cases import FAULTS, Fuzzer, Outcome
from tests.fuzz.targets import TARGETS, Target

HANG_SECONDS = 10
START_SECONDS = 120
"""How long a worker may take to make the good files."""


def work(
    first: int, stride: int, seed: int, root: str, targets: dict[str, Target], sender: Connection
) -> None:
    """Run the cases `first`, `first` + `stride` and so on. Send each number, then its outcome."""
    import torch

    torch.set_num_threads(1)
    fuzzer = Fuzzer(Path(root), seed, targets)
    number = first
    while True:
        sender.send((number, fuzzer.target_of(number)))
        outcome = fuzzer.run(number)
        sender.send(outcome)
        if outcome.kind == "memory":
            # The peak never falls again, so the next worker measures anew.
            return
        number += stride


@dataclass
class Worker:
    """A process that runs cases, and the case that it runs."""

    process: BaseProcess
    receiver: Connection
    number: int
    target: str = ""
    since: float = 0.0
    is_running: bool = False


class Supervisor:
    """Runs workers, replaces those that hang or crash, and counts outcomes."""

    def __init__(
        self, n_workers: int, seed: int, root: Path, targets: dict[str, Target] = TARGETS
    ) -> None:
        self.n_workers, self.seed, self.root, self.targets = n_workers, seed, root, targets
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.n_faults = 0
        self._n_started = 0
        self._workers = [self._start(first) for first in range(n_workers)]

    def _start(self, first: int) -> Worker:
        folder = self.root / f"worker-{self._n_started}"
        self._n_started += 1
        folder.mkdir()
        receiver, sender = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("spawn").Process(
            target=work,
            args=(first, self.n_workers, self.seed, str(folder), self.targets, sender),
            daemon=True,
        )
        process.start()
        sender.close()
        return Worker(process, receiver, first, since=time.monotonic())

    def run(self, seconds: float) -> None:
        """Run cases for `seconds`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            ready = set(wait([worker.receiver for worker in self._workers], timeout=0.5))
            for index, worker in enumerate(self._workers):
                if worker.receiver in ready:
                    try:
                        self._receive(worker)
                    except EOFError:
                        self._workers[index] = self._replace(worker, "crash")
                elif time.monotonic() - worker.since > (
                    HANG_SECONDS if worker.is_running else START_SECONDS
                ):
                    self._workers[index] = self._replace(worker, "hang")

    def stop(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.process.kill()
            worker.process.join()

    def _receive(self, worker: Worker) -> None:
        message = worker.receiver.recv()
        worker.since = time.monotonic()
        if isinstance(message, Outcome):
            self._count(worker.number, message)
            worker.is_running = False
        else:
            worker.number, worker.target = message
            worker.is_running = True

    def _replace(self, worker: Worker, kind: str) -> Worker:
        worker.process.kill()
        worker.process.join()
        if worker.is_running:
            detail = f"the process ended with {worker.process.exitcode}"
            self._count(worker.number, Outcome(kind, worker.target, "", detail))
        return self._start(worker.number + self.n_workers)

    def _count(self, number: int, outcome: Outcome) -> None:
        self.outcomes[outcome.target, outcome.kind] += 1
        if outcome.kind in FAULTS:
            self.n_faults += 1
            print(f"case {number}, {outcome}", flush=True)
