"""Whether a training that was killed goes on as if nothing had happened: tried out and compared.

Three trainings in a temporary folder, each in processes of its own, started as a user would: one
that is left alone, one that is killed, and the one that goes on from what was left of it.
"""

import dataclasses
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fastllama.checkpoints.folder import complete_checkpoints, step_of
from fastllama.config import Config, validate
from fastllama.errors import TrainingFailedError
from fastllama.logs.sinks import read_rows
from fastllama.run_folder import RunFolder, resolved_toml

# Float32 sums of the same terms in another order differ by some eps, 2^-23.
FLOAT32_TOLERANCE = 1e-6
# A weight whose float32 differs in the last bits may be rounded to the next bfloat16, 2^-8 away,
# and so may a gradient that is reduced in it. A loss adds the effects of many, of either sign, and
# moves by far less than one of them; 2^-10 still tells a batch, a moment or a rate that is wrong.
BFLOAT16_TOLERANCE = 1e-3
# Training amplifies rounding: in the quickstart's first updates what differs grows by a half each,
# seen over 8 of them. A wrong batch or weight shows in the first update that goes on, and a wrong
# moment or rate in the second, by more than is allowed there.
GROWTH = 2.0
MOST_ALLOWED = 1e-2


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is tried."""

    steps: int
    """Updates of a whole training."""
    interrupt_at: int
    """Updates after which it is killed, or a few more."""
    processes: int
    """Processes until then."""
    resume_processes: int
    """Processes that go on."""

    def validate(self, config: Config) -> None:
        """Refuse what cannot be tried.

        Raises:
            ValueError: one sentence with the values and the remedy.
        """
        if not 1 <= self.interrupt_at < self.steps:
            raise ValueError(
                f"--interrupt-at {self.interrupt_at} must be at least 1 and less than --steps "
                f"{self.steps}."
            )
        for processes in (self.processes, self.resume_processes):
            if processes < 1:
                raise ValueError(f"A training needs at least 1 process, not {processes}.")
            validate(config, processes)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The losses of two trainings, update by update."""

    straight: list[float]
    """Of the one that was left alone."""
    resumed: list[float]
    """Of the one that was killed and went on."""
    tolerance: float
    """Largest relative difference in the first update that goes on; 0 compares bits."""
    went_on_from: int
    """The update of the checkpoint that the second one went on from."""

    def allowed(self, step: int) -> float:
        """Largest relative difference of two losses of update `step` that count as the same."""
        n_later = max(0, step - self.went_on_from - 1)
        return self.tolerance and min(self.tolerance * GROWTH**n_later, MOST_ALLOWED)

    @property
    def differences(self) -> list[float]:
        """Relative differences; 0 for the same bits, NaN included, infinite for no number."""
        return [
            _difference(one, other) for one, other in zip(self.straight, self.resumed, strict=True)
        ]

    @property
    def first_wrong(self) -> int | None:
        """The first update that differs by more than is allowed, from 1, or None."""
        wrong = (n for n, each in enumerate(self.differences, 1) if each > self.allowed(n))
        return next(wrong, None)

    def table(self) -> str:
        """A line an update."""
        lines = [f"{'step':>6}  {'left alone':>14}  {'resumed':>14}  {'difference':>10}"]
        rows = zip(self.straight, self.resumed, self.differences, strict=True)
        for step, (one, other, difference) in enumerate(rows, 1):
            lines.append(f"{step:6}  {one:14.9f}  {other:14.9f}  {difference:10.2g}")
        return "\n".join(lines)


def _difference(one: float, other: float) -> float:
    if one == other or (math.isnan(one) and math.isnan(other)):
        return 0.0
    difference = abs(one - other) / abs(one) if one else math.inf
    return difference if math.isfinite(difference) else math.inf


def tolerance(config: Config, plan: Plan) -> float:
    """Largest relative difference of two losses of the first update that goes on."""
    if plan.processes == plan.resume_processes:
        return 0.0
    types = {config.training.dtype, config.parallel.reduce_dtype}
    return BFLOAT16_TOLERANCE if "bfloat16" in types else FLOAT32_TOLERANCE


def shortened(config: Config, plan: Plan) -> Config:
    """`config` for `plan.steps` updates that are all logged, with checkpoints before the kill."""
    per_update = config.training.tokens_per_update
    return dataclasses.replace(
        config,
        optimizer=dataclasses.replace(
            config.optimizer,
            warmup_iterations=min(config.optimizer.warmup_iterations, plan.steps // 2),
        ),
        training=dataclasses.replace(
            config.training,
            training_tokens=plan.steps * per_update,
            eval_interval=0,
            max_wall_time=0.0,
        ),
        checkpoint=dataclasses.replace(
            config.checkpoint,
            # Updates are lost, so that those that are done again are compared as well.
            interval_tokens=max(1, 2 * plan.interrupt_at // 3) * per_update,
            keep_every_tokens=0,
        ),
        logging=dataclasses.replace(
            config.logging, log_interval=1, sample_interval=0, tensorboard=False
        ),
    )


def verify_resume(config: Config, plan: Plan, report: Callable[[str], None]) -> bool:
    """Try `plan` with `config`; returns whether the losses are the same.

    Raises:
        ValueError: the plan does not fit the configuration.
        TrainingFailedError: a training failed, or was done before it could be killed.
    """
    config = shortened(config, plan)
    plan.validate(config)
    with tempfile.TemporaryDirectory(prefix="fastllama-verify-") as name:
        folder = Path(name)
        recipe = folder / "recipe.toml"
        recipe.write_text(resolved_toml(config))
        straight, killed = RunFolder(folder / "straight"), RunFolder(folder / "killed")
        report(f"training {plan.steps} updates on {_processes(plan.processes)}, left alone")
        start = ["train", str(recipe), "--run-dir"]
        _run_to_its_end([*start, str(straight.path)], plan.processes, folder)
        report(f"the same, killed once {plan.interrupt_at} updates are done")
        _kill_in_the_middle([*start, str(killed.path)], plan, killed, folder)
        at, done = _newest(killed), _steps(killed)
        report(
            f"killed after update {done}; going on from the checkpoint of update {at} on "
            f"{_processes(plan.resume_processes)}"
        )
        resume = ["train", "--resume", str(killed.path)]
        _run_to_its_end(resume, plan.resume_processes, folder)
        losses = _losses(straight), _losses(killed)
        comparison = Comparison(*losses, tolerance(config, plan), went_on_from=at)
    report(comparison.table())
    report(verdict(comparison, config, plan))
    return comparison.first_wrong is None


def verdict(comparison: Comparison, config: Config, plan: Plan) -> str:
    """What the losses show, in one sentence."""
    layout = f"{plan.processes} and then {_processes(plan.resume_processes)}"
    differences, wrong = comparison.differences, comparison.first_wrong
    if wrong is None:
        largest = max(differences)
        at = differences.index(largest) + 1
        how = (
            f"differ by at most {largest:.2g}, in update {at}, where "
            f"{comparison.allowed(at):.1g} is allowed"
            if largest
            else "are bit-identical"
        )
        return f"same: with {layout} the losses of all {len(comparison.straight)} updates {how}."
    allowed = f"{comparison.allowed(wrong):.1g} is allowed" if comparison.tolerance else "none may"
    remedy = ""
    if not comparison.tolerance and not config.training.deterministic:
        remedy = " On CUDA, try --training.deterministic true."
    return (
        f"different: with {layout} losses differ by {differences[wrong - 1]:.2g} in update "
        f"{wrong}, where {allowed}.{remedy}"
    )


def _processes(n: int) -> str:
    return "1 process" if n == 1 else f"{n} processes"


def _newest(run: RunFolder) -> int:
    """The update of the newest complete checkpoint; 0 if there is none."""
    return max(map(step_of, complete_checkpoints(run.checkpoints)), default=0)


def _losses(run: RunFolder) -> list[float]:
    return [row["loss"] for row in read_rows(run.metrics_csv)]


def _steps(run: RunFolder) -> int:
    """Updates in the log."""
    if not run.metrics_csv.exists():
        return 0
    # Under the header, and but for a line that is being written.
    return max(0, run.metrics_csv.read_text().count("\n") - 1)


def _run_to_its_end(arguments: list[str], n_processes: int, folder: Path) -> None:
    with _started(arguments, n_processes, folder) as process:
        process.wait()
    if process.returncode:
        raise TrainingFailedError(_complaint(folder))


def _kill_in_the_middle(arguments: list[str], plan: Plan, run: RunFolder, folder: Path) -> None:
    """Kill all processes with SIGKILL when enough updates and a checkpoint are on disk."""
    with _started(arguments, plan.processes, folder) as process:
        while _steps(run) < plan.interrupt_at or not _newest(run):
            if process.poll():
                raise TrainingFailedError(_complaint(folder))
            if process.returncode == 0:
                raise TrainingFailedError(
                    f"The training did all of its {plan.steps} updates before it could be killed "
                    f"after update {plan.interrupt_at} and a checkpoint; raise --steps."
                )
            time.sleep(0.002)


@contextmanager
def _started(
    arguments: list[str], n_processes: int, folder: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """`fastllama ARGUMENTS` on so many processes, none of which outlives the block."""
    command = [sys.executable, "-m"]
    if n_processes > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={n_processes}"]
        command += ["-m"]
    with open(folder / "output.txt", "wb") as output:
        process = subprocess.Popen(
            [*command, "fastllama", *arguments],
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                _kill([*_children(process.pid), process.pid])
                process.wait()


def _children(parent: int) -> list[int]:
    """Processes that `parent` started; torchrun gives each a session of its own."""
    return [pid for pid in _pids() if (status := _status(pid)) and status[1] == parent]


def _kill(pids: list[int]) -> None:
    """End processes and what they started, and wait until they hold no device or lock."""
    for pid in pids:
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    while any((status := _status(pid)) and status[0] not in "ZX" for pid in pids):
        time.sleep(0.01)


def _pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _status(pid: int) -> tuple[str, int] | None:
    """State and parent of a process, or None if it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The name of the program, in brackets, may hold anything.
    state, parent, *_ = text.rpartition(")")[2].split()
    return state, int(parent)


def _complaint(folder: Path) -> str:
    """The sentence a training that failed ended with, or else its last line."""
    lines = (folder / "output.txt").read_text(errors="replace").splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return f"A training failed: {[*lines[-1:], *errors[:1]][-1]}" if lines else "A training failed."
