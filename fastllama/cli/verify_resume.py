"""`fastllama verify-resume`."""

import sys
from dataclasses import dataclass, field
from functools import partial

from fastllama.cli.command import Command
from fastllama.cli.errors import FAILED
from fastllama.cli.parsing import ConfigOptions, base_config, parse, split_recipe
from fastllama.config import Config

PROG = "fastllama verify-resume CONFIG.toml"


@dataclass(frozen=True)
class VerifyResumeOptions:
    """Kill a short training, resume it, and compare its losses with an uninterrupted training.

    Give the recipe first: fastllama verify-resume CONFIG.toml [--group.field VALUE ...]. Three
    trainings run one after another. A temporary folder (TMPDIR) must hold the checkpoints of two
    runs. Exits with 0 if the losses are the same and with 1 if they differ. With the same number of
    processes before and after the kill, the losses must be bit-identical.
    """

    config: ConfigOptions = field(default_factory=Config)
    steps: int = 20
    """Updates of each training; the schedule is shortened to them."""
    interrupt_at: int | None = None
    """Kill all processes after this many updates, by default half of them; a fast training may do a
    few more."""
    processes: int = 1
    """Processes of a training; torchrun starts them if there are several."""
    resume_processes: int | None = None
    """Processes after the kill; None means as many as before."""


def run(args: list[str]) -> None:
    """Verify the resume of a recipe and print the losses; exit with 1 if they differ."""
    recipe, args = split_recipe(args)
    default = VerifyResumeOptions(base_config(recipe, args, PROG))
    options = parse(VerifyResumeOptions, args, PROG, default)
    from fastllama.tools.verify_resume import Plan, verify_resume

    plan = Plan(
        steps=options.steps,
        interrupt_at=(options.steps // 2 if options.interrupt_at is None else options.interrupt_at),
        processes=options.processes,
        resume_processes=(
            options.processes if options.resume_processes is None else options.resume_processes
        ),
    )
    if not verify_resume(options.config, plan, report=partial(print, flush=True)):
        sys.exit(FAILED)


COMMAND = Command(
    run,
    {
        "CONFIG.toml [--steps N] [--processes N] [--group.field VALUE …]": (
            "kill a short training, resume it, and compare it with an uninterrupted one"
        )
    },
)
