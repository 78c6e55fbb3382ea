"""Checks that a killed and resumed training has the losses of an uninterrupted one.

Three trainings run in a temporary folder, each started in new processes with the command line: one
uninterrupted, one killed, and one that resumes the killed run.
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
from fastllama.logs.rows import read_rows
from fastllama.run_folder import RunFolder, resolved_toml

# Float32 sums of the same terms in another order differ by a few eps, 2^-23.
FLOAT32_TOLERANCE = 1e-6
# A weight whose last float32 bits differ may round to the neighbouring bfloat16, 2^-8 away, and so
# may a gradient reduced in bfloat16. A loss sums many such errors of either sign, so it differs by
# far less than one of them; 2^-10 still shows a wrong batch, moment or learning rate.
BFLOAT16_TOLERANCE = 1e-3
# Training amplifies rounding: over 8 of the quickstart's first updates, the difference grew by half
# in each. A wrong batch or weight exceeds the tolerance in the first update after the resume, a
# wrong moment or learning rate in the second.
TOLERANCE_GROWTH = 2.0
MAX_TOLERANCE = 1e-2


@dataclasses.dataclass(frozen=True)
class Plan:
    """The trainings to run."""

    steps: int
    """Updates of a whole training."""
    interrupt_at: int
    """Updates before the kill; a fast training may do a few more."""
    processes: int
    """Processes before the kill."""
    resume_processes: int
    """Processes after the kill."""

    def validate(self, config: Config) -> None:
        """Check the plan against the configuration of the trainings.

        Raises:
            ValueError: the kill is not inside the training, or a number of processes does not fit.
        """
        if self.steps < 2:
            raise ValueError(f"--steps must be at least 2, not {self.steps}.")
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
    """The losses of the uninterrupted and the resumed training, by update."""

    uninterrupted: list[float]
    resumed: list[float]
    """Includes the updates before the kill."""
    tolerance: float
    """Largest relative difference in the first update after the resume; 0 compares bits."""
    resumed_from: int
    """Update of the checkpoint that was resumed."""

    def allowed(self, step: int) -> float:
        """Largest relative difference between the losses of update `step` that still match."""
        n_later = max(0, step - self.resumed_from - 1)
        return self.tolerance and min(self.tolerance * TOLERANCE_GROWTH**n_later, MAX_TOLERANCE)

    @property
    def differences(self) -> list[float]:
        """Relative differences by update.

        0 for equal losses and for two NaNs; infinite for others that cannot be divided.
        """
        return [
            _difference(one, other)
            for one, other in zip(self.uninterrupted, self.resumed, strict=True)
        ]

    @property
    def first_mismatch(self) -> int | None:
        """The first update, from 1, whose difference exceeds the tolerance; None if none does."""
        mismatches = (n for n, each in enumerate(self.differences, 1) if each > self.allowed(n))
        return next(mismatches, None)

    def table(self) -> str:
        """One line per update."""
        lines = [f"{'step':>6}  {'uninterrupted':>14}  {'resumed':>14}  {'difference':>10}"]
        rows = zip(self.uninterrupted, self.resumed, self.differences, strict=True)
        for step, (one, other, difference) in enumerate(rows, 1):
            lines.append(f"{step:6}  {one:14.9f}  {other:14.9f}  {difference:10.2g}")
        return "\n".join(lines)


def _difference(one: float, other: float) -> float:
    if one == other or (math.isnan(one) and math.isnan(other)):
        return 0.0
    difference = abs(one - other) / abs(one) if one else math.inf
    return difference if math.isfinite(difference) else math.inf


def tolerance(config: Config, plan: Plan) -> float:
    """Largest relative difference between the losses of the first update after the resume.

    0 for the same number of processes; another number sums gradients in another order.
    """
    if plan.processes == plan.resume_processes:
        return 0.0
    types = {config.training.dtype, config.parallel.reduce_dtype}
    return FLOAT32_TOLERANCE if types == {"float32"} else BFLOAT16_TOLERANCE


def shortened(config: Config, plan: Plan) -> Config:
    """`config` for `plan.steps` updates, all logged, with a checkpoint before the kill.

    Stages that begin later are left out.
    """
    per_update = config.training.tokens_per_update
    stages = [stage for stage in config.data.stages if config.first_step(stage) <= plan.steps]
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, stages=tuple(stages)),
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
            # Some updates between the checkpoint and the kill are lost and done again, and their
            # losses are compared too.
            interval_tokens=max(1, 2 * plan.interrupt_at // 3) * per_update,
            keep_every_tokens=0,
        ),
        logging=dataclasses.replace(
            config.logging, log_interval=1, sample_interval=0, tensorboard=False
        ),
    )


def verify_resume(config: Config, plan: Plan, report: Callable[[str], None]) -> bool:
    """Run the trainings of `plan` and compare their losses; `report` gets one line at a time.

    Returns:
        Whether the losses match.

    Raises:
        ValueError: the plan does not fit the configuration.
        TrainingFailedError: a training failed, or ended before it could be killed.
    """
    config = shortened(config, plan)
    plan.validate(config)
    with tempfile.TemporaryDirectory(prefix="fastllama-verify-") as name:
        folder = Path(name)
        recipe = folder / "recipe.toml"
        recipe.write_text(resolved_toml(config))
        uninterrupted = RunFolder(folder / "uninterrupted")
        killed = RunFolder(folder / "killed")
        start = ["train", str(recipe), "--run-dir"]
        report(f"training {plan.steps} updates on {_processes(plan.processes)}, uninterrupted")
        _run([*start, str(uninterrupted.path)], plan.processes, folder)
        report(f"training again, to be killed after update {plan.interrupt_at}")
        _run_and_kill([*start, str(killed.path)], plan, killed, folder)
        resumed_from = _newest_checkpoint(killed)
        report(
            f"killed after update {_logged_updates(killed)}; resuming from the checkpoint of "
            f"update {resumed_from} on {_processes(plan.resume_processes)}"
        )
        _run(["train", "--resume", str(killed.path)], plan.resume_processes, folder)
        comparison = Comparison(
            _losses(uninterrupted), _losses(killed), tolerance(config, plan), resumed_from
        )
    report(comparison.table())
    report(verdict(comparison, config, plan))
    return comparison.first_mismatch is None


def verdict(comparison: Comparison, config: Config, plan: Plan) -> str:
    """One sentence: whether the losses match, and the remedy if they do not."""
    layout = f"{_processes(plan.processes)}, then {_processes(plan.resume_processes)}"
    differences, mismatch = comparison.differences, comparison.first_mismatch
    if mismatch is None:
        n, largest = len(differences), max(differences)
        if not largest:
            return f"same: the losses of all {n} updates are bit-identical ({layout})."
        step = differences.index(largest) + 1
        return (
            f"same: the losses of all {n} updates differ by at most {largest:.2g}, in update "
            f"{step}, where {comparison.allowed(step):.1g} is allowed ({layout})."
        )
    exact = comparison.tolerance == 0
    rule = (
        "they must be bit-identical" if exact else f"{comparison.allowed(mismatch):.1g} is allowed"
    )
    remedy = ""
    if exact and not config.training.deterministic:
        remedy = " On CUDA, try --training.deterministic true."
    return (
        f"different: the losses of update {mismatch} differ by {differences[mismatch - 1]:.2g}, "
        f"where {rule} ({layout}).{remedy}"
    )


def _processes(n: int) -> str:
    return "1 process" if n == 1 else f"{n} processes"


def _newest_checkpoint(run: RunFolder) -> int:
    """The update of the newest complete checkpoint; 0 if there is none."""
    return max(map(step_of, complete_checkpoints(run.checkpoints)), default=0)


def _losses(run: RunFolder) -> list[float]:
    return [row["loss"] for row in read_rows(run.metrics_csv)]


def _logged_updates(run: RunFolder) -> int:
    if not run.metrics_csv.exists():
        return 0
    # One line is the header. A line without its end is still being written and does not count.
    return max(0, run.metrics_csv.read_text().count("\n") - 1)


def _run(arguments: list[str], n_processes: int, folder: Path) -> None:
    """Run `fastllama ARGUMENTS` to its end.

    Raises:
        TrainingFailedError: it failed.
    """
    with _started(arguments, n_processes, folder) as process:
        process.wait()
    if process.returncode:
        raise _failure(process.returncode, folder)


def _failure(code: int, folder: Path) -> Exception:
    """What a training that exited with `code` raises here: 2 is a mistake of the user."""
    message = _error_message(folder)
    return ValueError(message) if code == 2 else TrainingFailedError(message)


def _run_and_kill(arguments: list[str], plan: Plan, run: RunFolder, folder: Path) -> None:
    """Run `fastllama ARGUMENTS`; SIGKILL it once enough updates and a checkpoint are on disk.

    Raises:
        TrainingFailedError: it failed, or ended before the kill.
    """
    with _started(arguments, plan.processes, folder) as process:
        while _logged_updates(run) < plan.interrupt_at or not _newest_checkpoint(run):
            if process.poll():
                raise _failure(process.returncode, folder)
            if process.returncode == 0:
                raise TrainingFailedError(
                    f"The training did all {plan.steps} updates before it could be killed after "
                    f"update {plan.interrupt_at} and a checkpoint; raise --steps."
                )
            time.sleep(0.002)


@contextmanager
def _started(
    arguments: list[str], n_processes: int, folder: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Start `fastllama ARGUMENTS` on `n_processes`; kill all that still run at the end."""
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
    """Process ids that `parent` started; torchrun starts each in its own session."""
    return [pid for pid in _pids() if (status := _status(pid)) and status[1] == parent]


def _kill(pids: list[int]) -> None:
    """Kill the process groups of `pids`, and wait until they have released devices and locks."""
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
    """State and parent of a process; None if it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The program name, in parentheses, may itself contain spaces and parentheses.
    state, parent, *_ = text.rpartition(")")[2].split()
    return state, int(parent)


def _error_message(folder: Path) -> str:
    """A sentence with the error that a training printed, or else with its last line."""
    lines = (folder / "output.txt").read_text(errors="replace").splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return f"A training failed: {[*lines[-1:], *errors[:1]][-1]}" if lines else "A training failed."
