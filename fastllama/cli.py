"""The command line: parse, call one function, print; nothing heavy is imported before its use."""

import contextlib
import gc
import io
import itertools
import json
import os
import signal
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, TypeVar, cast

import tyro

from fastllama import __version__
from fastllama.config import Config, load_recipe, nearest_key, takes_booleans, validate
from fastllama.distributed.flight_recorder import dump_path
from fastllama.errors import FailedElsewhereError, FailedFirstError, TrainingFailedError

Options = TypeVar("Options")

HELP = """\
usage: fastllama COMMAND [OPTIONS]

Train LLaMA models from scratch.

  fastllama tokenizer train --input PATH… --output tokenizer.json
      learn a byte-level BPE vocabulary from text
  fastllama prepare --input PATH… --tokenizer tokenizer.json --output data/NAME
      encode documents into token shards
  fastllama data check data/NAME
      read every shard against its checksum
  fastllama train CONFIG.toml [--run-dir runs/NAME] [--group.field VALUE …]
      train, or go on with a run that was interrupted
  fastllama train --resume runs/NAME [--group.field VALUE …]
      go on with a run, with other options where that is possible
  fastllama verify-resume CONFIG.toml [--steps N] [--processes N] [--group.field VALUE …]
      kill a short training, resume it, and compare it with one that was left alone
  fastllama generate runs/NAME --prompt TEXT
      continue a text with a trained model

`fastllama COMMAND --help` explains the options of one. On several devices:
`torchrun --nproc-per-node 8 -m fastllama train CONFIG.toml`.

options:
  --help     show this text
  --version  show the version
  --debug    show the traceback of an error too (with any command)

exit codes:
  0    done
  1    failed
  2    a mistake in what was asked for
  85   training stopped early, what was done is saved: the same command goes on from there
  130  ended at once by Ctrl-C: a second one, or where no training is under way yet;
       after SIGTERM it is 143, after SIGUSR1 138
"""


@dataclass(frozen=True)
class TokenizerTrainOptions:
    """Learn a byte-level BPE vocabulary from text and write it as tokenizer.json."""

    input: tuple[str, ...]
    """Files, folders or globs of .txt, .jsonl and .parquet (.gz and .zst too)."""
    output: Path = Path("tokenizer.json")
    """File to write."""
    vocab_size: int = 8192
    """Entries, the four special tokens and 256 bytes included."""
    field: str = "text"
    """Field with the text in JSON Lines and Parquet."""


@dataclass(frozen=True)
class PrepareOptions:
    """Encode documents into token shards; started again after an interruption, it continues."""

    input: tuple[str, ...]
    """Files, folders or globs of .txt, .jsonl and .parquet (.gz and .zst too)."""
    tokenizer: Path
    """The tokenizer.json to encode with; any Hugging Face tokenizer will do."""
    output: Path
    """Folder to write, data/NAME."""
    field: str = "text"
    """Field with the text in JSON Lines and Parquet."""
    validation_fraction: float = 0.0
    """Share of the documents held out."""
    shard_tokens: int = 100_000_000
    """Tokens in a shard."""
    end_token: str | None = None
    """Special token that ends each document; None finds the tokenizer's own."""
    strict: bool = False
    """Stop at the first malformed record instead of counting and skipping it."""
    workers: int | None = None
    """Encoding threads; None means one per core."""


@dataclass(frozen=True)
class DataCheckOptions:
    """Read every shard of a data folder: checksums, sizes, types, token ids."""

    folder: tyro.conf.Positional[Path]
    """Folder written by fastllama prepare."""


@dataclass(frozen=True)
class TrainOptions:
    """Train the model of a recipe, or go on with a run.

    Give the recipe first: fastllama train CONFIG.toml [--group.field VALUE ...]. A run that was
    interrupted goes on from its newest checkpoint when the same command is typed again. SIGINT
    (Ctrl-C), SIGTERM, SIGUSR1 and --training.max-wall-time finish the update, save a checkpoint and
    exit with 85; a second signal stops at once.
    """

    config: Annotated[Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff] = field(
        default_factory=Config
    )
    run_dir: Path | None = None
    """Folder of the run; None means runs/ and the name of the recipe."""
    resume: Path | None = None
    """Go on with this run; its own configuration takes the place of the recipe."""
    print_config: bool = False
    """Print the resolved configuration and what follows from it, and exit."""


@dataclass(frozen=True)
class VerifyResumeOptions:
    """Kill a short training of a recipe, resume it, and compare it with one that was left alone.

    Give the recipe first: fastllama verify-resume CONFIG.toml [--group.field VALUE ...]. Three
    trainings run one after another in a temporary folder (TMPDIR), which takes room for two
    checkpoints of each. Exits with 0 if the losses are the same, to the bit where the number of
    processes is, and with 1 if they are not.
    """

    config: Annotated[Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff] = field(
        default_factory=Config
    )
    steps: int = 20
    """Updates of each training; the schedule is shortened to them."""
    interrupt_at: int = 10
    """Updates after which all processes are killed; fast ones may do a few more."""
    processes: int = 1
    """Processes of a training, started through torchrun if more than one."""
    resume_processes: int | None = None
    """Processes that go on after the kill; None means as many as before."""


@dataclass(frozen=True)
class GenerateOptions:
    """Continue a text with a trained model, token by token as it is drawn."""

    run: tyro.conf.Positional[Path]
    """Run folder, or one checkpoint inside it."""
    prompt: str = ""
    """Text to continue; empty starts a document."""
    max_new_tokens: int = 128
    """Tokens to add, if the text does not end before."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the most likely token."""
    top_k: int | None = None
    """Keep only this many most likely tokens."""
    top_p: float = 1.0
    """Keep the fewest most likely tokens whose probabilities sum to at least this."""
    seed: int = 0
    """The same seed draws the same text."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto takes CUDA when there is one."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit.

    0: done, 1: failed, 2: a mistake in what was asked for, 85: training stopped early and what was
    done is saved, 130: Ctrl-C where no training is under way. Other signals end the process there.
    """
    given = sys.argv[1:] if argv is None else argv
    args = [part for arg in given for part in split_option(arg)]
    rest = without_debug(args)
    debug = len(rest) < len(args)
    code = 0
    try:
        run_command(rest)
    except KeyboardInterrupt:
        code = 130
    except FailedElsewhereError:
        # What torchrun reports is who had failed when it looked: leave that to the one that tells
        # why, and be ended with it.
        time.sleep(5)
        code = 1
    except FailedFirstError as failure:
        code = tell_first_failure(failure, debug)
    except (ValueError, OSError, TrainingFailedError) as error:
        # A mistake is the same everywhere, so one process a node tells it; a failure may not be.
        if os.environ.get("LOCAL_RANK", "0") == "0" or not isinstance(error, ValueError):
            if debug:
                traceback.print_exc()
            print(f"error: {textwrap.shorten(str(error), width=1000)}", file=sys.stderr)
        code = exit_code(error)
    # Outside of the except block, whose error would keep the process group and its threads alive
    # into the interpreter's last moments, where they abort it; as an error in a cycle would.
    if code:
        gc.collect()
        sys.exit(code)


def exit_code(error: BaseException) -> int:
    """2 for a mistake in what was asked for, 1 for a failure."""
    return 2 if isinstance(error, (ValueError, *MISTAKEN_PATHS)) else 1


def tell_first_failure(failure: FailedFirstError, debug: bool) -> int:
    """Say on stderr, and through torchrun at the very end, what ended the first of several.

    Returns:
        The exit code.
    """
    error = failure.__cause__
    assert error is not None
    expected = isinstance(error, (ValueError, OSError, TrainingFailedError))
    kind = "" if expected else f"{type(error).__name__}: "
    sentence = f"rank {failure.rank}: {kind}{textwrap.shorten(str(error), width=1000)}"
    print(f"error: {sentence}", file=sys.stderr)
    if (dumps := dump_path()) and not expected:
        print(
            f"collectives: if one timed out, the last of each are in {dumps}RANK", file=sys.stderr
        )
    if debug or not expected:
        traceback.print_exception(error)
    sys.stderr.flush()
    tell_torchrun(sentence)
    return exit_code(error)


def tell_torchrun(sentence: str) -> None:
    """Have torchrun end its report with a sentence on this process, if it is one of torchrun's."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        # It shows the `py_callstack` of the earliest of these files.
        extra = {"py_callstack": sentence, "timestamp": str(int(time.time()))}
        message = {"message": sentence, "extraInfo": extra}
        Path(path).write_text(json.dumps({"message": message}))


def split_option(arg: str) -> list[str]:
    """`--name=value` as two arguments; a value that looks like an option stays attached."""
    name, equals, value = arg.partition("=")
    return [name, value] if arg.startswith("--") and equals and value[:1] != "-" else [arg]


def without_debug(args: list[str]) -> list[str]:
    """`args` without `--debug`; between an option and its value it stays, and tyro refuses it."""
    around = zip(["", *args], args, [*args[1:], "-"], strict=False)
    return [
        arg
        for before, arg, after in around
        if arg != "--debug" or (before.startswith("--") and after[:1] != "-")
    ]


# Told apart from every failure, so that a scheduler can queue the same command once more.
STOPPED = 85

MISTAKEN_PATHS = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)


class UsageError(ValueError):
    """A command line that cannot be understood."""


def run_command(args: list[str]) -> None:
    """Find the command in `args` and call it with the rest."""
    if not args or args[0] in ("--help", "-h", "help"):
        print(HELP, end="")
    elif args[0] == "--version":
        print(f"fastllama {__version__}")
    elif args[:2] == ["tokenizer", "train"]:
        tokenizer_train(parse(TokenizerTrainOptions, args[2:], "fastllama tokenizer train"))
    elif args[:2] == ["data", "check"]:
        data_check(parse(DataCheckOptions, args[2:], "fastllama data check"))
    elif args[0] in COMMANDS:
        COMMANDS[args[0]](args[1:])
    else:
        raise UsageError(f"There is no command {' '.join(args[:2])!r}; see fastllama --help.")


def parse(
    kind: type[Options], args: list[str], prog: str, default: Options | None = None
) -> Options:
    """Parse `args` with tyro, its boxed complaints turned into one sentence.

    Raises:
        UsageError: an unknown option, with the nearest known one, or a value of another type.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            options, unknown = tyro.cli(
                kind, args=args, prog=prog, default=default, return_unknown_args=True
            )
    except SystemExit as stop:
        if stop.code == 0:
            raise
        raise UsageError(f"{unbox(complaint.getvalue())}; see {prog} --help.") from None
    if unknown:
        name = unknown[0].split("=")[0]
        if "." in name:
            raise UsageError(f"Unknown option {name}{nearest_key(name[2:].replace('-', '_'))}")
        raise UsageError(f"Unknown option {name}; see {prog} --help.")
    return cast(Options, options)  # tyro types it as what default may be, None included


def unbox(text: str) -> str:
    """The first paragraph inside a titled box, drawn with lines or, without UTF-8, with dashes."""
    words: list[str] = []
    for line in text.splitlines()[1:]:
        content = line.strip("│|╰╯+ ")
        if not set(content) <= set("─-"):
            words += content.split()
        elif words:
            break
    return " ".join(words).rstrip(".")


def tokenizer_train(options: TokenizerTrainOptions) -> None:
    """`fastllama tokenizer train`."""
    from fastllama.data.documents import Skipping, find_files, read_documents
    from fastllama.data.tokenizer import (
        fingerprint,
        refuse_output,
        save_tokenizer,
        train_tokenizer,
        verify_round_trip,
        vocabulary_size,
    )

    refuse_output(options.output)
    records = read_documents(find_files(options.input), options.field)
    skipping = Skipping(tell=partial(print, file=sys.stderr))
    texts = (document.text for document in skipping.documents(records))
    tokenizer = train_tokenizer(texts, options.vocab_size)
    verify_round_trip(tokenizer, ROUND_TRIPS)
    save_tokenizer(tokenizer, options.output)
    size = vocabulary_size(tokenizer)
    few = "" if size == options.vocab_size else f" of {options.vocab_size}, all the text gave"
    print(
        f"{options.output}: {size} entries{few}, fingerprint {fingerprint(tokenizer)[:12]}, "
        f"{skipping.count:,} malformed records skipped"
    )
    print(f"next: fastllama prepare --input … --tokenizer {options.output} --output data/NAME")


ROUND_TRIPS = (
    "def f(x):\n\treturn x  # 3.14\r\n",
    "naïve façade",
    "日本語 한국어 العربية",
    "🦙\u200d🔥",
    "<EOS>",
)


def prepare(args: list[str]) -> None:
    """`fastllama prepare`."""
    options = parse(PrepareOptions, args, "fastllama prepare")
    from fastllama.data.prepare import prepare

    manifest = prepare(
        options.input,
        options.tokenizer,
        options.output,
        field=options.field,
        validation_fraction=options.validation_fraction,
        shard_tokens=options.shard_tokens,
        end_token=options.end_token,
        strict=options.strict,
        workers=options.workers,
    )
    for name, split in manifest.splits.items():
        print(f"{options.output} {name}: {split.tokens:,} tokens in {split.documents:,} documents")
    print(f"next: fastllama train CONFIG.toml --data.path {options.output}")


def data_check(options: DataCheckOptions) -> None:
    """`fastllama data check`."""
    from fastllama.data.manifest import Manifest

    manifest = Manifest.load(options.folder)
    manifest.check_contents(options.folder)
    tokens = sum(split.tokens for split in manifest.splits.values())
    print(f"{options.folder}: {tokens:,} tokens, as they were written")


def train(args: list[str]) -> None:
    """`fastllama train`."""
    options, run_path = parse_train(args)
    if options.print_config:
        print_config(options.config)
        return
    from rich.console import Console

    from fastllama.run_folder import RunFolder
    from fastllama.train import train

    is_main = os.environ.get("RANK", "0") == "0"
    console = Console(quiet=not is_main, highlight=False, soft_wrap=True, markup=False)
    finished = train(
        options.config, RunFolder(run_path), console, resume=options.resume is not None
    )
    if not finished:
        # Every rank is on its way out now, and is to leave with this code: a launcher that sees
        # the first one gone signals the others.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        console.print(
            "Stopped early. Go on with the same command, or with: "
            f"fastllama train --resume {run_path}"
        )
        tell_torchrun(f"no failure: stopped early and saved, exit code {STOPPED}")
        sys.exit(STOPPED)
    lines = (
        f"run     {run_path}",
        f"plot    {run_path / 'loss.png'}",
        f"next    fastllama generate {run_path} --prompt {options.config.logging.sample_prompt!r}",
    )
    console.print("\n".join(lines))


def parse_train(args: list[str]) -> tuple[TrainOptions, Path]:
    """Options of `fastllama train`, over the recipe or run they start from, and the run's path."""
    recipe = Path(args.pop(0)) if args and not args[0].startswith("-") else None
    # Read before the rest is parsed, because it gives the defaults.
    resume = next(
        (value for option, value in itertools.pairwise(args) if option == "--resume"), None
    )
    asks_help = "--help" in args or "-h" in args
    if recipe is not None and resume is not None:
        raise UsageError("Give a recipe or --resume, not both; a run has its own configuration.")
    if resume is not None and not asks_help:
        from fastllama.run_folder import RunFolder

        config = RunFolder(Path(resume)).load_config()
    elif recipe is not None:
        config = load_recipe(recipe)
    elif asks_help:
        config = Config()
    else:
        raise UsageError("Give a recipe, fastllama train CONFIG.toml, or --resume RUN.")
    options = parse(
        TrainOptions,
        with_python_booleans(args),
        "fastllama train CONFIG.toml",
        TrainOptions(config=config),
    )
    if options.resume is not None and options.run_dir is not None:
        raise UsageError("--run-dir names a new run and --resume an old one; give one of them.")
    name = recipe.stem if recipe is not None else ""
    return options, options.resume or options.run_dir or Path("runs") / name


def verify_resume(args: list[str]) -> None:
    """`fastllama verify-resume`."""
    recipe = Path(args.pop(0)) if args and not args[0].startswith("-") else None
    if recipe is None and not {"--help", "-h"} & set(args):
        raise UsageError("Give a recipe, fastllama verify-resume CONFIG.toml.")
    options = parse(
        VerifyResumeOptions,
        with_python_booleans(args),
        "fastllama verify-resume CONFIG.toml",
        VerifyResumeOptions(config=load_recipe(recipe) if recipe is not None else Config()),
    )
    from fastllama.tools.verify_resume import Plan, verify_resume

    plan = Plan(
        steps=options.steps,
        interrupt_at=options.interrupt_at,
        processes=options.processes,
        resume_processes=(
            options.processes if options.resume_processes is None else options.resume_processes
        ),
    )
    if not verify_resume(options.config, plan, report=partial(print, flush=True)):
        sys.exit(1)


def with_python_booleans(args: list[str]) -> list[str]:
    """`args` with the values `true` and `false` of options of `Config` as tyro reads them."""
    spelt = list(args)
    for place, (option, value) in enumerate(itertools.pairwise(args), 1):
        if takes_booleans(option.removeprefix("--").replace("-", "_")):
            spelt[place] = {"true": "True", "false": "False"}.get(value, value)
    return spelt


def print_config(config: Config) -> None:
    """Print a configuration as TOML, what follows from it as comments."""
    from fastllama.distributed.world import world_size
    from fastllama.planning.bound import ASSUMED_RATES, bound
    from fastllama.planning.flops import flops_per_token, n_parameters
    from fastllama.planning.memory import plan_memory
    from fastllama.run_folder import resolved_toml

    validate(config, world_size())
    model = config.model
    print(resolved_toml(config))
    print(f"# parameters             {n_parameters(model):,}")
    print(f"# feed-forward width     {model.ffn_hidden}")
    print(f"# head width             {model.head_dim}")
    print(f"# updates                {config.n_updates:,}")
    print(f"# accumulation steps     {config.accumulation_steps(world_size())}")
    print(f"# GFLOP/token, causal    {flops_per_token(model, causal=True) / 1e9:.3f}")
    print(f"# GFLOP/token, PaLM      {flops_per_token(model, causal=False) / 1e9:.3f}")
    for reshard, name in ((False, "kept"), (True, "resharded")):
        total = plan_memory(config, world_size(), reshard=reshard).total
        print(f"# GiB/device, {name:10} {total / 2**30:.1f}")
    per_device = config.training.tokens_per_update // world_size()
    for device, rates in ASSUMED_RATES.items():
        most = bound(model, per_device, rates).tokens_per_second
        print(f"# bound on one {device}      {most:,.0f} tok/s, assumed rates")


def generate(args: list[str]) -> None:
    """`fastllama generate`."""
    options = parse(GenerateOptions, args, "fastllama generate")
    from fastllama.distributed.world import choose_device
    from fastllama.inference.generate import generate_text, load_run
    from fastllama.inference.sampling import Sampling

    sampling = Sampling(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )
    sampling.validate()
    loaded = load_run(options.run, choose_device(options.device))
    print(options.prompt, end="", flush=True)
    pieces = generate_text(
        loaded.model, loaded.tokenizer, options.prompt, sampling, loaded.end_token
    )
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "prepare": prepare,
    "train": train,
    "verify-resume": verify_resume,
    "generate": generate,
}
