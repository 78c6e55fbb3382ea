"""Injects faults into trainings, and checks that each one resumes bit-identically.

    python -m tests.faults --kills 50 --seed 0

A training of 1 to 4 ranks is killed again and again: at named points inside an update, a copy, a
write, a rename or a removal, and at random moments. Either one rank is killed or all at once.
Sometimes the disk is full for one write, or a bit of the newest checkpoint flips; the disk of the
console's log is full, the reader of the console goes away, or the terminal hangs up. Some trainings
are on a file system without locks, or without symbolic links.

After each fault, three things must hold. Every checkpoint reported as saved is whole, except one
damaged on purpose. The next start resumes from the newest whole checkpoint. At the end all losses,
weights and moments are bit-equal to those of an uninterrupted training.

Prints a line per fault. Exits with 1 if a check failed.
"""

import argparse
import csv
import errno
import fcntl
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.ranks import Outcome, forked, launch  # first, because it sets PyTorch's threads

# isort: split
from safetensors.torch import load_file

import fastllama.training.side_jobs
from fastllama.checkpoints import shards
from fastllama.checkpoints.folder import complete_checkpoints, latest_name, step_of
from fastllama.checkpoints.reading import find_damage, read_progress
from fastllama.cli.errors import STOPPED
from tests.fault_points import POINTS, Trigger
from tests.workspace import make_workspace

N_UPDATES = 30
UPDATES_PER_CHECKPOINT = 3
OPTIONS = (
    *("--training.training-tokens", str(N_UPDATES * 256)),
    *("--training.eval-interval", "0"),
    # The statistics of past updates must resume bit-identically too.
    *("--training.spike-z-score", "6"),
    *("--checkpoint.interval-tokens", str(UPDATES_PER_CHECKPOINT * 256)),
    *("--checkpoint.keep-last", "2"),
    *("--logging.sample-interval", "0"),
)
LAYOUTS = {
    "1": (1, ()),
    "2": (2, ()),
    "4": (4, ()),
    "2 x 2": (4, ("--parallel.replicate", "2")),
}
"""Ranks, and the options of the layout."""


def unsupported(*arguments: Any, **keywords: Any) -> None:
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


def use_file_system(kind: str) -> None:
    """Take the locks or the symbolic links from the file system of this process."""
    if kind == "no locks":
        fcntl.flock = unsupported
    elif kind == "no links":
        os.symlink = Path.symlink_to = unsupported  # type: ignore[assignment,method-assign]


def train_while_writing() -> None:
    """Make writing a shard take longer than an update, so that they overlap; draw no plot."""
    original = shards.write_shard

    def write_shard(*arguments: Any) -> Any:
        time.sleep(0.1)
        return original(*arguments)

    shards.write_shard = write_shard
    fastllama.training.side_jobs.plot_loss = lambda *args, **keywords: None


FULL_DISK_POINTS = ("half a shard", "after the shards", "half a manifest.json", "before the rename")
CONSOLE_POINTS = ("before the update", "half a log row", "half a shard")
FILES = ("shard", "progress.json", "manifest.json", "latest")
FILE_SYSTEMS = ("complete", "no locks", "no links")


def fill_log() -> None:
    """Let stdout be on a full disk from now on."""
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def close_reader() -> None:
    """Let the reader of stdout and stderr be gone from now on."""
    read_end, write_end = os.pipe()
    os.dup2(write_end, 1)
    os.dup2(write_end, 2)
    os.close(read_end)


def hang_up() -> None:
    """Close the terminal, as its shell and the kernel both report."""
    ours, terminal = os.openpty()
    os.dup2(terminal, 1)
    os.dup2(terminal, 2)
    os.close(ours)
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGHUP)


CONSOLE_FAULTS = {"full log": fill_log, "dead reader": close_reader, "hang-up": hang_up}


@dataclass(frozen=True)
class Fault:
    """One fault."""

    kind: str
    """kill one, kill all, random moment, full disk, flipped bit, or one of `CONSOLE_FAULTS`."""
    where: str
    """A name of `POINTS`; for a random moment the seconds, for a flipped bit one of `FILES`."""
    visit: int = 0
    """The visit of the point that causes the fault, from 1."""
    rank: int = 0

    def prepare(self, rank: int) -> None:
        """Install the trigger in a rank that is about to train."""
        if self.where in POINTS and rank == self.rank:
            POINTS[self.where].install(self._trigger())

    def _trigger(self) -> Trigger:
        visits = 0

        def trigger(leave_half: Callable[[], object] = lambda: None) -> None:
            nonlocal visits
            visits += 1
            if visits != self.visit:
                return
            if self.kind in CONSOLE_FAULTS:
                CONSOLE_FAULTS[self.kind]()
                return
            leave_half()
            if self.kind == "full disk":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if self.kind == "kill all":
                os.killpg(0, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)

        return trigger


def draw_faults(draw: random.Random) -> Iterator[tuple[str, str]]:
    """Kinds and places of faults, without end: every point twice, mixed with the other kinds."""
    while True:
        names = draw.sample(list(POINTS), len(POINTS))
        files = draw.sample(FILES, len(FILES))
        consoles = draw.sample(list(CONSOLE_FAULTS), len(CONSOLE_FAULTS))
        for number, name in enumerate(names):
            for kind in draw.sample(("kill one", "kill all"), 2):
                yield kind, name
            if number % 3 == 0:
                yield "random moment", f"{draw.uniform(0.5, 2.5):.2f} s"
            if number % 4 == 1:
                yield "flipped bit", files[number // 4]
            if number % 5 == 2:
                yield "full disk", draw.choice(FULL_DISK_POINTS)
            if number % 4 == 3:
                yield consoles[number // 4], draw.choice(CONSOLE_POINTS)


def draw_visit(kind: str, where: str, world_size: int, draw: random.Random) -> Fault:
    """Choose the rank and the visit of the point that cause the fault."""
    if where not in POINTS:
        return Fault(kind, where)
    point = POINTS[where]
    # Only the main rank prints.
    rank = 0 if point.main_only or kind in CONSOLE_FAULTS else draw.randrange(world_size)
    return Fault(kind, where, visit=draw.randint(1, point.visits), rank=rank)


def flip_bit(run: Path, name: str, draw: random.Random) -> Path | None:
    """Flip a bit of the newest checkpoint; return the checkpoint, or None if it stays whole."""
    checkpoints = run / "checkpoints"
    newest = complete_checkpoints(checkpoints)[0]
    if name == "latest":
        # The content of a link is the name that it points at.
        (checkpoints / "latest").unlink(missing_ok=True)
        (checkpoints / "latest").symlink_to("sTep-00000000")
        return None
    path = draw.choice(sorted(newest.glob(f"{name}*")))
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    return newest


def losses(run: Path) -> dict[int, str]:
    """Loss and gradient norm of every update, as text."""
    with open(run / "metrics.csv", newline="") as file:
        return {int(row["step"]): row["loss"] + row["grad_norm"] for row in csv.DictReader(file)}


def last_tensors(run: Path) -> list[tuple[str, bytes]]:
    """Names and bits of all tensors of the newest checkpoint, in the order of its shards."""
    return [
        (name, tensor.numpy().tobytes())
        for path in sorted(complete_checkpoints(run / "checkpoints")[0].glob("shard*"))
        for name, tensor in sorted(load_file(path).items())
    ]


class CheckFailedError(Exception):
    """A training did not keep a guarantee."""


def check(holds: bool, failure: str) -> None:
    if not holds:
        raise CheckFailedError(failure)


@dataclass
class Training:
    """One run folder, and the checkpoints that it must have."""

    folder: Path
    recipe: Path
    layout: str
    file_system: str = "complete"
    newest_step: int = 0
    """The update of the newest whole checkpoint."""
    damaged_step: int = 0
    """The update of a newer checkpoint that was damaged on purpose; 0 for none."""

    def start(self, fault: Fault | None = None) -> Outcome:
        """Train until the fault or the end; check the output and the checkpoints."""
        world_size, options = LAYOUTS[self.layout]
        log = self.folder.with_suffix(".log")
        log.unlink(missing_ok=True)
        at_random_moment = fault is not None and fault.kind == "random moment"
        outcome = launch(
            world_size,
            ["train", self.recipe, "--run-dir", self.folder, *OPTIONS, *options],
            log,
            prepare=lambda rank: self._prepare(rank, fault),
            kill_after=float(fault.where.split()[0]) if fault and at_random_moment else None,
        )
        resumed = re.search(r"resuming after update (\d+)", outcome.printed)
        started = " starting of " in outcome.printed
        if resumed or started:
            step = int(resumed[1]) if resumed else 0
            check(step == self.newest_step, f"resumed from {step}, not {self.newest_step}")
            reported = f"step-{self.damaged_step:08d}" in outcome.printed
            check(not self.damaged_step or reported, "the damage was not reported")
            self.damaged_step = 0
        self._check_checkpoints(outcome)
        return outcome

    def _prepare(self, rank: int, fault: Fault | None) -> None:
        use_file_system(self.file_system)
        train_while_writing()
        # Ignored if this script runs under nohup.
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        if fault is not None:
            fault.prepare(rank)

    def _check_checkpoints(self, outcome: Outcome) -> None:
        paths = complete_checkpoints(self.folder / "checkpoints")
        undamaged = [path for path in paths if step_of(path) != self.damaged_step]
        for path in undamaged:
            damage = find_damage(path)
            check(damage is None, f"not whole: {damage}")
        saved = [int(step) for step in re.findall(r"saved \S*step-(\d+) ", outcome.printed)]
        newest = max(map(step_of, undamaged), default=0)
        expected = max([self.newest_step, *saved])
        check(newest >= expected, f"lost checkpoint {expected}, newest is {newest}")
        self.newest_step = newest

    def inject(self, fault: Fault, draw: random.Random) -> str:
        """Cause a fault; return one phrase about its effect."""
        if fault.kind == "flipped bit":
            return self._flip_bit(fault.where, draw)
        before = self.newest_step
        outcome = self.start(fault)
        if fault.kind == "full disk":
            check(set(outcome.codes) == {0}, f"ended with {outcome.codes}: {outcome.printed}")
            lost = re.search(r"step-(\d+) could not be written: .*No space left", outcome.printed)
            if lost is None:
                freed = re.search(r"The disk is full: removed step-(\d+)", outcome.printed)
                check(freed is not None, "the full disk was not reported")
                return f"checkpoint {int(freed[1])} freed, trained until {self.newest_step}"  # type: ignore[index]
            return f"checkpoint {int(lost[1])} lost, trained until {self.newest_step}"
        if fault.kind in CONSOLE_FAULTS:
            return self._check_console(fault.kind, outcome)
        if set(outcome.codes) == {0}:
            return f"finished before the fault, at {self.newest_step}"
        killed = -signal.SIGKILL in outcome.codes
        check(killed, f"ended with {outcome.codes}: {outcome.printed}")
        return f"codes {' '.join(map(str, outcome.codes))}: {before} -> {self.newest_step}"

    def _check_console(self, kind: str, outcome: Outcome) -> str:
        code = STOPPED if kind == "hang-up" else 0
        check(set(outcome.codes) == {code}, f"ended with {outcome.codes}: {outcome.printed}")
        check("Traceback" not in outcome.printed, outcome.printed)
        if kind == "full log":
            said = "lines for stdout could not be written: No space left on device"
            check(said in outcome.printed, f"the lost lines were not reported: {outcome.printed}")
        return f"exit code {code}, trained until {self.newest_step}"

    def _flip_bit(self, name: str, draw: random.Random) -> str:
        damaged = flip_bit(self.folder, name, draw)
        if damaged is None:
            return "nothing lost"
        check(find_damage(damaged) is not None, "the flipped bit was not found")
        self.damaged_step = step_of(damaged)
        older = complete_checkpoints(self.folder / "checkpoints")[1:]
        self.newest_step = step_of(older[0]) if older else 0
        return f"checkpoint {self.damaged_step} damaged, {self.newest_step} is whole"

    def finish(self, uninterrupted: Path) -> None:
        """Train to the end, and compare with an uninterrupted training."""
        outcome = self.start()
        check(set(outcome.codes) == {0}, f"ended with {outcome.codes}: {outcome.printed}")
        check(losses(self.folder) == losses(uninterrupted), "different losses")
        check(last_tensors(self.folder) == last_tensors(uninterrupted), "different weights")
        newest, reference = (
            complete_checkpoints(run / "checkpoints")[0] for run in (self.folder, uninterrupted)
        )
        found, expected = read_progress(newest), read_progress(reference)
        check(found == expected, f"different progress: {found}, not {expected}")
        leftovers = {path.name for path in (self.folder / "checkpoints").glob(".*")}
        check(not leftovers, f"left behind {leftovers}")
        latest = newest.with_name("latest")
        check(latest_name(latest.parent) == newest.name, "latest names another checkpoint")
        check(latest.is_symlink() == (self.file_system != "no links"), "latest is of another kind")
        reported = "cannot be locked" in outcome.printed
        check(reported == (self.file_system == "no locks"), f"locks: {outcome.printed}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="kills, at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(0 if inject_all(Path(folder), **vars(arguments)) else 1)


def inject_all(folder: Path, kills: int, seed: int, layouts: list[str]) -> bool:
    """Inject faults into trainings of each layout in turn; return whether all checks passed."""
    draw = random.Random(seed)
    print(f"seed {seed}; training, ranks, file system, fault, place, visit and rank, effect")
    forked(lambda: make_workspace(folder))
    uninterrupted: dict[str, Path] = {}
    faults = draw_faults(draw)
    # Flipped bits, until the training has a checkpoint.
    postponed: list[tuple[str, str]] = []
    killed = failed = runs = 0
    began = time.monotonic()
    while killed < kills:
        layout = layouts[runs % len(layouts)]
        if layout not in uninterrupted:
            uninterrupted[layout] = folder / f"uninterrupted-{len(uninterrupted)}"
            Training(uninterrupted[layout], folder / "tiny.toml", layout).start()
        runs += 1
        file_system = FILE_SYSTEMS[runs % len(FILE_SYSTEMS)]
        training = Training(folder / f"run-{runs}", folder / "tiny.toml", layout, file_system)
        try:
            while training.newest_step < N_UPDATES - 2 * UPDATES_PER_CHECKPOINT and killed < kills:
                has_checkpoint = training.newest_step > 0
                drawn = postponed.pop() if postponed and has_checkpoint else next(faults)
                if drawn[0] == "flipped bit" and not has_checkpoint:
                    postponed.append(drawn)
                    continue
                fault = draw_visit(*drawn, LAYOUTS[layout][0], draw)
                visit = f"visit {fault.visit} rank {fault.rank}" if fault.visit else ""
                print(
                    f"{runs:3}  {layout:5}  {file_system:8}  {fault.kind:13}  {fault.where:20}  "
                    f"{visit:15}",
                    end="  ",
                )
                effect = training.inject(fault, draw)
                killed += effect.startswith("codes")
                print(effect, flush=True)
            training.finish(uninterrupted[layout])
            print(
                f"{runs:3}  {layout:5}  {file_system:8}  finished: "
                "losses, weights, moments bit-equal"
            )
            shutil.rmtree(training.folder)
        except CheckFailedError as failure:
            failed += 1
            print(f"FAILED: {failure}", flush=True)
    seconds = time.monotonic() - began
    print(f"{killed} kills of {runs} trainings in {seconds:.0f} s, {failed} failed; seed {seed}")
    return not failed


if __name__ == "__main__":
    main()
