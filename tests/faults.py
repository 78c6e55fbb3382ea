"""Kills trainings at the worst moments, and sees that each goes on as if nothing had happened.

    python -m tests.faults --kills 50 --seed 0

A training of 1 to 4 ranks is killed again and again: at named points inside an update, a copy, a
write, a rename or a removal, and at random moments; now one rank, now all at once. Its disk is full
for a while, and bits of its newest checkpoint flip. After each blow every checkpoint that was said
to be saved must still be whole (but for the one that was damaged on purpose), the next start must
go on from the newest whole one, and in the end every loss and every weight must be, to the bit,
those of a training that was left alone. Prints a line a blow; exits with 1 if one went wrong.
"""

import argparse
import csv
import errno
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.ranks import Outcome, forked, launch  # first: it sets the threads of PyTorch

# isort: split
from safetensors.torch import load_file
from torch.distributed.checkpoint import filesystem

import fastllama.atomic
import fastllama.checkpoints.writing
import fastllama.logs.sinks
import fastllama.train
import fastllama.training.side_jobs
from fastllama.checkpoints.folder import complete_checkpoints, step_of
from fastllama.checkpoints.reading import find_damage, read_progress
from fastllama.checkpoints.state import TrainState
from tests.workspace import make_workspace

N_UPDATES = 30
UPDATES_A_CHECKPOINT = 3
OPTIONS = (
    *("--training.training-tokens", str(N_UPDATES * 256)),
    *("--training.eval-interval", "0"),
    *("--training.spike-z-score", "6"),  # statistics of past updates, which have to be exact too
    *("--checkpoint.interval-tokens", str(UPDATES_A_CHECKPOINT * 256)),
    *("--checkpoint.keep-last", "2"),
    *("--logging.sample-interval", "0"),
)
LAYOUTS = {
    "1": (1, ()),
    "2": (2, ()),
    "4": (4, ()),
    "2 x 2": (4, ("--parallel.replicate", "2")),
}

Strike = Callable[..., None]
"""Called at a point each time it is passed; acts at the time that was drawn. It is told how to
leave things half done first."""


def before_update(strike: Strike) -> None:
    original = fastllama.train.update

    def update(*args: Any) -> Any:
        strike()
        return original(*args)

    fastllama.train.update = update


def after_update(strike: Strike) -> None:
    original = fastllama.train.update

    def update(*args: Any) -> Any:
        result = original(*args)
        strike()
        return result

    fastllama.train.update = update


def half_a_log_row(strike: Strike) -> None:
    original = fastllama.logs.sinks.append

    def append(path: Path, text: str) -> None:
        strike(lambda: original(path, text[: len(text) // 2]))
        original(path, text)

    fastllama.logs.sinks.append = append


def half_staged(strike: Strike) -> None:
    original = TrainState.tensors

    class Struck(dict[str, Any]):
        def items(self) -> Iterator[tuple[str, Any]]:  # type: ignore[override]
            for number, item in enumerate(super().items()):
                if number == len(self) // 2:
                    strike()
                yield item

    TrainState.tensors = lambda state: Struck(original(state))  # type: ignore[method-assign]


def half_a_shard(strike: Strike) -> None:
    original = filesystem.FileSystem.create_stream

    class Struck:
        def __init__(self, stream: Any) -> None:
            self._stream = stream

        def write(self, content: bytes) -> None:
            strike(lambda: (self._stream.write(content[: len(content) // 2]), self._stream.flush()))
            self._stream.write(content)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._stream, name)

    @contextmanager
    def create_stream(self: Any, path: Any, mode: str) -> Iterator[Any]:
        with original(self, path, mode) as stream:
            yield Struck(stream)

    filesystem.FileSystem.create_stream = create_stream


def before_checksums(strike: Strike) -> None:
    original = fastllama.checkpoints.writing.describe

    def describe(folder: Path, pattern: str) -> Any:
        if pattern.startswith("shard"):
            strike()
        return original(folder, pattern)

    fastllama.checkpoints.writing.describe = describe


def half_a_json(name: str) -> Callable[[Strike], None]:
    def point(strike: Strike) -> None:
        original = fastllama.checkpoints.writing.write_atomic

        def write_atomic(path: Path, content: str) -> None:
            if path.name == name:
                aside = path.with_name(f".{path.name}.partial")
                strike(lambda: aside.write_text(content[: len(content) // 2]))
            original(path, content)

        fastllama.checkpoints.writing.write_atomic = write_atomic

    return point


def at_rename(pattern: str, after: bool) -> Callable[[Strike], None]:
    def point(strike: Strike) -> None:
        original = os.replace

        def replace(source: Any, target: Any) -> None:
            concerns = re.fullmatch(pattern, Path(target).name) is not None
            if concerns and not after:
                strike()
            original(source, target)
            if concerns and after:
                strike()

        os.replace = replace

    return point


def half_removed(strike: Strike) -> None:
    original = shutil.rmtree

    def rmtree(path: Path, ignore_errors: bool = False) -> None:
        if str(path).endswith(".removed"):
            strike(lambda: next(iter(path.iterdir())).unlink())
        original(path, ignore_errors=ignore_errors)

    shutil.rmtree = rmtree  # type: ignore[assignment]


def train_while_writing() -> None:
    """Have a shard take longer than an update, so that training goes on meanwhile; draw no plot."""
    original = filesystem.FileSystem.create_stream

    @contextmanager
    def create_stream(self: Any, path: Any, mode: str) -> Iterator[Any]:
        time.sleep(0.1)
        with original(self, path, mode) as stream:
            yield stream

    filesystem.FileSystem.create_stream = create_stream
    fastllama.training.side_jobs.plot_loss = lambda *args, **keywords: None


@dataclass(frozen=True)
class Point:
    """A moment that can be struck."""

    install: Callable[[Strike], None]
    passes: int
    """The most often it is passed by one rank in a checkpoint's time, about."""
    main_only: bool
    """Whether only the main rank passes it."""


POINTS = {
    "before the update": Point(before_update, 6, False),
    "after the update": Point(after_update, 6, False),
    "half a log row": Point(half_a_log_row, 12, True),
    "half staged": Point(half_staged, 2, False),
    "half a shard": Point(half_a_shard, 2, False),
    "before checksums": Point(before_checksums, 2, False),
    "half a progress.json": Point(half_a_json("progress.json"), 2, True),
    "half a manifest.json": Point(half_a_json("manifest.json"), 2, True),
    "before the rename": Point(at_rename(r"step-\d+", after=False), 2, True),
    "after the rename": Point(at_rename(r"step-\d+", after=True), 2, True),
    "before latest": Point(at_rename("latest", after=False), 2, True),
    "after latest": Point(at_rename("latest", after=True), 2, True),
    "before a removal": Point(at_rename(r".*\.removed", after=False), 1, True),
    "half removed": Point(half_removed, 1, True),
}
FULL_DISK = ("half a shard", "before checksums", "half a manifest.json", "before the rename")
FILES = ("shard", "progress.json", "manifest.json", "latest")


@dataclass(frozen=True)
class Blow:
    """One thing that goes wrong."""

    kind: str
    """kill one, kill all, random moment, full disk, or flipped bit."""
    point: str
    time: int = 0
    rank: int = 0

    def prepare(self, rank: int) -> None:
        """Set the trap in a rank that is about to train."""
        train_while_writing()
        if self.point in POINTS and rank == self.rank:
            POINTS[self.point].install(self._strike())

    def _strike(self) -> Strike:
        passed = 0

        def strike(leave_half: Callable[[], object] = lambda: None) -> None:
            nonlocal passed
            passed += 1
            if passed != self.time:
                return
            leave_half()
            if self.kind == "full disk":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if self.kind == "kill all":
                os.killpg(0, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)

        return strike


def draw_blows(draw: random.Random) -> Iterator[tuple[str, str]]:
    """Without end: each point in turn struck twice, and in between what has no point."""
    while True:
        names = draw.sample(list(POINTS), len(POINTS))
        files = draw.sample(FILES, len(FILES))
        for number, name in enumerate(names):
            for kind in draw.sample(("kill one", "kill all"), 2):
                yield kind, name
            if number % 3 == 0:
                yield "random moment", f"{draw.uniform(0.5, 2.5):.2f} s"
            if number % 4 == 1:
                yield "flipped bit", files[number // 4]
            if number % 5 == 2:
                yield "full disk", draw.choice(FULL_DISK)


def aim(kind: str, point: str, world_size: int, draw: random.Random) -> Blow:
    """Choose the time a point is passed at and the rank it strikes."""
    if point not in POINTS:
        return Blow(kind, point)
    where = POINTS[point]
    rank = 0 if where.main_only else draw.randrange(world_size)
    return Blow(kind, point, time=draw.randint(1, where.passes), rank=rank)


def flip_bit(run: Path, name: str, draw: random.Random) -> Path | None:
    """Damage a file of the newest checkpoint; the checkpoint, unless it stays whole."""
    checkpoints = run / "checkpoints"
    newest = complete_checkpoints(checkpoints)[0]
    if name == "latest":
        # A bit of a link is a bit of the name it points at.
        (checkpoints / "latest").unlink()
        (checkpoints / "latest").symlink_to("sTep-00000000")
        return None
    path = draw.choice(sorted(newest.glob(f"{name}*")))
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    return newest


def losses(run: Path) -> dict[int, str]:
    with open(run / "metrics.csv", newline="") as file:
        return {int(row["step"]): row["loss"] + row["grad_norm"] for row in csv.DictReader(file)}


def last_tensors(run: Path) -> list[tuple[str, bytes]]:
    """Name and bits of every tensor of the last checkpoint, shard after shard."""
    return [
        (name, tensor.numpy().tobytes())
        for path in sorted((run / "checkpoints/latest").glob("shard*"))
        for name, tensor in sorted(load_file(path).items())
    ]


class BrokenPromiseError(Exception):
    """A promise that was not kept."""


def require(kept: bool, promise: str) -> None:
    if not kept:
        raise BrokenPromiseError(promise)


@dataclass
class Training:
    """One run folder and all that happens to it."""

    folder: Path
    recipe: Path
    layout: str
    whole: int = 0
    """The update of the newest checkpoint that has to be there."""
    lost: int = 0
    """The update of the newest checkpoint that was damaged on purpose."""

    def start(self, blow: Blow | None = None) -> Outcome:
        """Train until the blow falls or the end; check what is printed and what is on disk."""
        world_size, options = LAYOUTS[self.layout]
        log = self.folder.with_suffix(".log")
        log.unlink(missing_ok=True)
        outcome = launch(
            world_size,
            ["train", self.recipe, "--run-dir", self.folder, *OPTIONS, *options],
            log,
            prepare=blow.prepare if blow else lambda rank: train_while_writing(),
            kill_after=float(blow.point.split()[0])
            if blow and blow.kind == "random moment"
            else None,
        )
        resumed = re.search(r"resuming after update (\d+)", outcome.printed)
        started = " starting of " in outcome.printed
        if resumed or started:
            step = int(resumed[1]) if resumed else 0
            require(step == self.whole, f"went on from {step}, not {self.whole}")
            told = f"step-{self.lost:08d}" in outcome.printed
            require(not self.lost or told, "said nothing of the damage")
            self.lost = 0
        self._check_checkpoints(outcome)
        return outcome

    def _check_checkpoints(self, outcome: Outcome) -> None:
        paths = complete_checkpoints(self.folder / "checkpoints")
        for path in paths:
            damage = None if step_of(path) == self.lost else find_damage(path)
            require(damage is None, f"not whole: {damage}")
        steps = [step_of(path) for path in paths if step_of(path) != self.lost]
        said = [int(step) for step in re.findall(r"saved \S*step-(\d+) ", outcome.printed)]
        newest = max(steps, default=0)
        expected = max([self.whole, *said])
        require(newest >= expected, f"lost {expected}, newest is {newest}")
        self.whole = newest

    def suffer(self, blow: Blow, draw: random.Random) -> str:
        """Let one blow fall; say what came of it."""
        if blow.kind == "flipped bit":
            damaged = flip_bit(self.folder, blow.point, draw)
            if damaged is None:
                return "nothing lost"
            require(find_damage(damaged) is not None, "the flipped bit was not found")
            self.lost = step_of(damaged)
            left = complete_checkpoints(self.folder / "checkpoints")[1:]
            self.whole = step_of(left[0]) if left else 0
            return f"update {self.lost} damaged, {self.whole} is whole"
        before = self.whole
        outcome = self.start(blow)
        if blow.kind == "full disk":
            require(set(outcome.codes) == {0}, f"ended with {outcome.codes}: {outcome.printed}")
            refused = re.search(
                r"step-(\d+) could not be written: .*No space left", outcome.printed
            )
            require(refused is not None, "said nothing of the full disk")
            return f"update {int(refused[1])} refused, trained on to {self.whole}"  # type: ignore[index]
        if set(outcome.codes) == {0}:
            return f"finished before it, at {self.whole}"
        signalled = -signal.SIGKILL in outcome.codes
        require(signalled, f"ended with {outcome.codes}: {outcome.printed}")
        return f"codes {' '.join(map(str, outcome.codes))}: {before} -> {self.whole}"

    def finish(self, undisturbed: Path) -> None:
        """Train to the end; compare with a training that was left alone."""
        outcome = self.start()
        require(set(outcome.codes) == {0}, f"ended with {outcome.codes}: {outcome.printed}")
        require(losses(self.folder) == losses(undisturbed), "other losses than undisturbed")
        require(last_tensors(self.folder) == last_tensors(undisturbed), "other weights or moments")
        ours, theirs = (
            read_progress(run / "checkpoints/latest") for run in (self.folder, undisturbed)
        )
        require(ours == theirs, f"other progress: {ours}, not {theirs}")
        names = {path.name for path in (self.folder / "checkpoints").glob(".*")}
        require(not names, f"left behind {names}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="how many, at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(0 if strike_all(Path(folder), **vars(arguments)) else 1)


def strike_all(folder: Path, kills: int, seed: int, layouts: list[str]) -> bool:
    """Strike trainings of each layout in turn until enough were killed; whether all went well."""
    draw = random.Random(seed)
    print(f"seed {seed}; training, ranks, blow, point, time and rank, what came of it")
    forked(lambda: make_workspace(folder))
    undisturbed: dict[str, Path] = {}
    blows = draw_blows(draw)
    held: list[tuple[str, str]] = []  # until there is a checkpoint to damage
    killed = failed = runs = 0
    began = time.monotonic()
    while killed < kills:
        layout = layouts[runs % len(layouts)]
        if layout not in undisturbed:
            undisturbed[layout] = folder / f"undisturbed-{len(undisturbed)}"
            Training(undisturbed[layout], folder / "tiny.toml", layout).start()
        runs += 1
        training = Training(folder / f"run-{runs}", folder / "tiny.toml", layout)
        try:
            while training.whole < N_UPDATES - 2 * UPDATES_A_CHECKPOINT and killed < kills:
                drawn = held.pop() if held and training.whole else next(blows)
                if drawn[0] == "flipped bit" and not training.whole:
                    held.append(drawn)
                    continue
                blow = aim(*drawn, LAYOUTS[layout][0], draw)
                where = f"time {blow.time} rank {blow.rank}" if blow.time else ""
                print(
                    f"{runs:3}  {layout:5}  {blow.kind:13}  {blow.point:20}  {where:14}", end="  "
                )
                came = training.suffer(blow, draw)
                killed += came.startswith("codes")
                print(came, flush=True)
            training.finish(undisturbed[layout])
            print(f"{runs:3}  {layout:5}  went on to the end: losses, weights, moments bit-equal")
            shutil.rmtree(training.folder)
        except BrokenPromiseError as broken:
            failed += 1
            print(f"FAILED: {broken}", flush=True)
    seconds = time.monotonic() - began
    print(f"{killed} kills of {runs} trainings in {seconds:.0f} s, {failed} failed; seed {seed}")
    return not failed


if __name__ == "__main__":
    main()
