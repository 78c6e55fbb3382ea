"""`fastllama train`."""

import itertools
import os
import shlex
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path

from fastllama.cli.command import Command
from fastllama.cli.errors import STOPPED, UsageError
from fastllama.cli.parsing import ConfigOptions, asks_help, base_config, parse, split_recipe
from fastllama.cli.streams import print_result, require_stdout
from fastllama.config import Config, validate
from fastllama.distributed.failure_reports import report_to_torchrun


@dataclass(frozen=True)
class TrainOptions:
    """Train the model of a recipe, or resume a run.

    Give the recipe first: fastllama train CONFIG.toml [--group.field VALUE ...]. After an
    interruption, the same command resumes the run from its newest checkpoint. SIGINT (Ctrl-C),
    SIGTERM, SIGUSR1, SIGHUP (a closed terminal) and --training.max-wall-time finish the update,
    save a checkpoint and exit with 85; a second signal other than SIGHUP stops at once.
    """

    config: ConfigOptions = field(default_factory=Config)
    run_dir: Path | None = None
    """Folder of the run; None means runs/NAME for the recipe NAME.toml."""
    resume: Path | None = None
    """Resume the run in this folder, with its own configuration instead of a recipe. Or resume from
    one of its checkpoints: later ones are kept aside, or with --run-dir stay, and the run branches
    off into the new folder."""
    print_config: bool = False
    """Print the resolved configuration and the values that follow from it, and exit."""


def run(args: list[str]) -> None:
    """Train a run to its end, or until it is asked to stop."""
    options, path, checkpoint = parse_train(args)
    if options.print_config:
        print_config(options.config)
        return
    from fastllama.checkpoints.weights_only import refuse_resume
    from fastllama.console import Console
    from fastllama.run_folder import RunFolder
    from fastllama.train import train

    if options.resume is None:
        refuse_resume(RunFolder(path), None)
    console = Console(quiet=os.environ.get("RANK", "0") != "0")
    finished = train(
        options.config,
        RunFolder(path),
        console,
        resume=options.resume is not None,
        checkpoint=checkpoint,
    )
    if not finished:
        # A launcher that sees the first rank exit sends SIGTERM to the others, and a terminal that
        # closes sends SIGHUP twice. All ranks are exiting, and must exit with this code.
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        console.print(
            "Stopped early. Resume with the same command, or with: "
            f"fastllama train --resume {shlex.quote(str(path))}"
        )
        report_to_torchrun(f"no failure: stopped early and saved, exit code {STOPPED}")
        sys.exit(STOPPED)
    prompt = options.config.logging.sample_prompt
    lines = [f"run     {path}"]
    if (path / "loss.png").exists():
        lines.append(f"plot    {path / 'loss.png'}")
    generate = f"fastllama generate {shlex.quote(str(path))} --prompt {shlex.quote(prompt)}"
    console.print("\n".join([*lines, f"next    {generate}"]))


def parse_train(args: list[str]) -> tuple[TrainOptions, Path, Path | None]:
    """The options, over the recipe or the run that `args` names.

    Also returns the folder of the run, and the checkpoint that `--resume` names, if it names one.
    """
    recipe, args = split_recipe(args)
    # The configuration gives the defaults of the options, so --resume is read before them.
    resume = next(
        (value for option, value in itertools.pairwise(args) if option == "--resume"), None
    )
    if recipe is not None and resume is not None:
        raise UsageError("Give a recipe or --resume, not both; a run has its own configuration.")
    resumed, checkpoint = Path(), None
    if resume is not None and not asks_help(args):
        from fastllama.checkpoints.folder import locate
        from fastllama.checkpoints.weights_only import refuse_resume

        run, checkpoint = locate(Path(resume))
        resumed, config = run.path, run.load_config()
        refuse_resume(run, checkpoint)
    else:
        config = base_config(recipe, args, "fastllama train CONFIG.toml, or --resume RUN")
    options = parse(TrainOptions, args, "fastllama train CONFIG.toml", TrainOptions(config))
    if options.resume is not None and options.run_dir is not None and checkpoint is None:
        raise UsageError(
            "--run-dir names a new run and --resume an old one; give one of them, or branch off "
            f"from a checkpoint: --resume {options.resume / 'checkpoints' / 'latest'}."
        )
    if options.resume is not None:
        refuse_other_origin(resumed, config, options.config)
        return options, options.run_dir or resumed, checkpoint
    name = recipe.stem if recipe is not None else ""
    return options, options.run_dir or Path("runs") / name, None


def refuse_other_origin(path: Path, before: Config, now: Config) -> None:
    """Raise UsageError if a run that has begun is to begin from other weights."""
    from fastllama.run_folder import RunFolder

    for name in ("init_from", "init_moments"):
        old, new = (getattr(config.training, name) for config in (before, now))
        if old != new and RunFolder(path).has_checkpoints:
            raise UsageError(
                f"training.{name} = {new} is for a new run, and {path} has checkpoints; leave it "
                "out, or give a recipe and another --run-dir."
            )


def print_config(config: Config) -> None:
    """Print a configuration as TOML, and the values that follow from it as comments."""
    from fastllama.distributed.world import world_size
    from fastllama.planning.bound import DEVICE_RATES, bound
    from fastllama.planning.flops import flops_per_token, n_parameters
    from fastllama.planning.memory import (
        describe_choice,
        largest_stage,
        plan_memory,
        possible_choices,
    )
    from fastllama.run_folder import resolved_toml

    validate(config, world_size())
    model = config.model
    print_result(resolved_toml(config))
    print(f"# parameters             {n_parameters(model):,}")
    print(f"# feed-forward width     {model.ffn_width}")
    print(f"# head_dim               {model.head_width}")
    print(f"# updates                {config.n_updates:,}")
    for stage in config.stages:
        print(
            f"# accumulation steps     {stage.accumulation_steps(world_size())}{_shape_of(stage)}"
        )
    print(f"# GFLOP/token, causal    {flops_per_token(model, causal=True) / 1e9:.3f}")
    print(f"# GFLOP/token, PaLM      {flops_per_token(model, causal=False) / 1e9:.3f}")
    for choice in possible_choices(largest_stage(config, world_size()), world_size()):
        gibibytes = plan_memory(choice, world_size()).total / 2**30
        print(f"# GiB/device             {gibibytes:.1f}: {describe_choice(choice, world_size())}")
    print(f"# memory                 {explain_memory(config)}")
    per_device = config.training.tokens_per_update // world_size()
    for device, rates in DEVICE_RATES.items():
        most = bound(model, per_device, rates).tokens_per_second
        print(f"# bound on one {device}      {most:,.0f} tok/s, rates {rates.source}")
    require_stdout()


def _shape_of(stage: Config) -> str:
    """The micro-batch of a stage; empty in a run without stages."""
    if not stage.data.stages:
        return ""
    return f" of {stage.training.batch_size} x {stage.model.max_seq_len}"


def explain_memory(config: Config) -> str:
    """What a run on this machine would do about memory, or why its device has too little."""
    import torch

    from fastllama.distributed.fsdp import choose_on
    from fastllama.distributed.world import world_size

    on_cuda = config.training.device != "cpu" and torch.cuda.is_available()
    try:
        return choose_on(torch.device("cuda" if on_cuda else "cpu"), config, world_size())[1]
    except ValueError as error:
        return str(error)


COMMAND = Command(
    run,
    {
        "CONFIG.toml [--run-dir runs/NAME] [--group.field VALUE …]": (
            "train, or resume an interrupted run"
        ),
        "--resume runs/NAME [--group.field VALUE …]": (
            "resume a run, with other options where possible"
        ),
    },
)
