"""The command line: find a command, run it, exit with its code.

A file for each command holds its options, its call and what it prints. It imports PyTorch and
tokenizers only after its options are parsed, so that help and usage errors appear at once.
"""

import gc
import os
import sys
from collections.abc import Iterable, Sequence

from fastllama import __version__
from fastllama.cli import (
    data_check,
    data_import,
    data_join,
    data_show,
    data_stats,
    export,
    generate,
    import_weights,
    merge,
    prepare,
    tokenizer_repair,
    tokenizer_train,
    train,
    verify_resume,
)
from fastllama.cli.command import Command
from fastllama.cli.errors import REPORTED, UsageError, report
from fastllama.cli.parsing import split_options, without_debug
from fastllama.cli.streams import guard_streams, report_lost_lines, require_stdout
from fastllama.errors import PeerFailedError, RankFailedError

SPIN_COUNT = "3000"
"""Rounds that a thread of GNU's OpenMP spins before it sleeps; its own default is 300,000."""
NEW_OBJECTS = 100_000
"""Objects after which Python looks for garbage. Its own default, 700 or 2,000, costs a tenth of the
time until the first update: imports and torch.compile make a million objects, and hardly a cycle.
"""

# In the order of the help text, which follows the way from text to a trained model.
COMMANDS: dict[tuple[str, ...], Command] = {
    ("tokenizer", "train"): tokenizer_train.COMMAND,
    ("tokenizer", "repair"): tokenizer_repair.COMMAND,
    ("prepare",): prepare.COMMAND,
    ("data", "import"): data_import.COMMAND,
    ("data", "join"): data_join.COMMAND,
    ("data", "check"): data_check.COMMAND,
    ("data", "stats"): data_stats.COMMAND,
    ("train",): train.COMMAND,
    ("data", "show"): data_show.COMMAND,
    ("verify-resume",): verify_resume.COMMAND,
    ("generate",): generate.COMMAND,
    ("export",): export.COMMAND,
    ("import",): import_weights.COMMAND,
    ("merge",): merge.COMMAND,
}

HELP = """\
usage: fastllama COMMAND [OPTIONS]

Train LLaMA models from scratch.

{commands}

`fastllama COMMAND --help` explains the options of a command. On several devices:
`torchrun --nproc-per-node 8 -m fastllama train CONFIG.toml`.

options:
  --help     show this text
  --version  show the version
  --debug    also show the traceback of an error (with any command)

exit codes:
  0    success
  1    failure
  2    mistake in the command, or in a file or folder it names
  85   training stopped early and saved; the same command resumes it
  130  ended at once by Ctrl-C: the second one during training, otherwise the first;
       SIGTERM ends with 143, SIGUSR1 with 138 and SIGHUP with 129
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command in `argv`, by default the arguments of the process.

    Returns after a success; otherwise exits with a code that `fastllama --help` explains. SIGTERM,
    SIGUSR1 and SIGHUP end the process when no training handles them. A console that cannot be
    written ends nothing.
    """
    if argv is None:
        limit_spinning()
        gc.set_threshold(NEW_OBJECTS)
    guard_streams()
    given = split_options(list(sys.argv[1:] if argv is None else argv))
    args = without_debug(given)
    debug = len(args) < len(given)
    code, is_one_of_many = 0, False
    try:
        run_command(args)
    except REPORTED as error:
        code = report(error, debug, of_training=args[:1] == ["train"])
        is_one_of_many = isinstance(error, (RankFailedError, PeerFailedError))
    finally:
        report_lost_lines()
    if is_one_of_many:
        end_process(code)
    # Exit outside the except block. Inside it, the traceback keeps the frames of the training
    # alive, and with them the process group: its threads then abort the interpreter while it shuts
    # down. An error in a reference cycle does the same, so the cycles are collected first.
    if code:
        gc.collect()
        sys.exit(code)


def limit_spinning() -> None:
    """Make OpenMP's threads sleep soon when they wait, unless the user has chosen how they wait.

    OpenMP reads the variable when PyTorch is loaded. Threads that spin take the time of the thread
    that they wait for, if another process is busy; threads that sleep at once wake late. See
    benchmarks/waiting_policy.py.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT


def end_process(code: int) -> None:
    """Exit without the interpreter's shutdown, in which threads may wait for other ranks."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_command(args: list[str]) -> None:
    """Run the command that `args` starts with.

    Raises:
        UsageError: there is no such command, or it cannot take the arguments.
    """
    if not args or args[0] in ("--help", "-h", "help"):
        print(help_text(), end="")
        require_stdout()
        return
    if args[0] == "--version":
        print(f"fastllama {__version__}")
        require_stdout()
        return
    for name, command in COMMANDS.items():
        n_words = len(name)
        if tuple(args[:n_words]) == name:
            _require_current_folder()
            command.run(args[n_words:])
            return
    group = [name for name in COMMANDS if len(name) > 1 and name[0] == args[0]]
    if group and (len(args) == 1 or args[1] in ("--help", "-h", "help")):
        print(f"usage: fastllama {args[0]} COMMAND [OPTIONS]\n\n{forms_of(group)}")
        require_stdout()
        return
    raise UsageError(f"There is no command {' '.join(args[:2])!r}; see fastllama --help.")


def _require_current_folder() -> None:
    """Raise UsageError if the current folder is gone: numerical libraries end the process there."""
    try:
        os.getcwd()
    except OSError as error:
        raise UsageError(
            f"The current folder cannot be used ({error.strerror}); change to another one with cd."
        ) from None


def help_text() -> str:
    """The text of `fastllama --help`."""
    return HELP.format(commands=forms_of(COMMANDS))


def forms_of(names: Iterable[tuple[str, ...]]) -> str:
    """The lines of the help text for these commands."""
    return "\n".join(
        f"  fastllama {' '.join(name)} {arguments}\n      {summary}"
        for name in names
        for arguments, summary in COMMANDS[name].forms.items()
    )
