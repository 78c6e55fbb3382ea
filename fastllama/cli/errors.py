"""How a command fails: its exit code, and one sentence on stderr."""

import errno
import os
import sys

from fastllama.distributed.failure_reports import print_traceback
from fastllama.errors import EXPECTED, PeerFailedError, RankFailedError, sentence

FAILED = 1
MISTAKE = 2
# Differs from every failure, so that a scheduler can submit the same command again on this code.
STOPPED = 85
INTERRUPTED = 130

REPORTED = (KeyboardInterrupt, PeerFailedError, RankFailedError, *EXPECTED)
"""Errors that `report` takes; Python prints the traceback of any other and exits with 1."""
WRONG_PATHS = (
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)
"""OSErrors that are mistakes of the user; the others are failures of the machine."""
WRONG_NAMES = (errno.ENAMETOOLONG, errno.ELOOP, errno.EROFS)
"""Their numbers, where Python has no class for them."""


class UsageError(ValueError):
    """A command line that cannot be parsed."""


def report(error: BaseException, debug: bool, *, of_training: bool = True) -> int:
    """Print one of the `REPORTED` errors on stderr and return the exit code.

    One of several ranks has told its failure already. `debug` adds the traceback. Only a training
    has ranks: for other commands the variables of a launcher mean nothing.
    """
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, PeerFailedError):
        return FAILED
    if isinstance(error, RankFailedError):
        assert error.__cause__ is not None
        # A bug has its traceback already.
        if debug and isinstance(error.__cause__, EXPECTED):
            print_traceback(error.__cause__)
        return exit_code(error.__cause__)
    # Every process makes the same mistake, so one process per node prints it. Another error may
    # differ between processes, so each prints its own.
    is_repeated = of_training and _is_second_on_node() and isinstance(error, ValueError)
    if not is_repeated:
        if debug:
            print_traceback(error)
        print(f"error: {sentence(error)}", file=sys.stderr)
    return exit_code(error)


def _is_second_on_node() -> bool:
    """Whether another rank on this node makes the same mistake and says so."""
    is_one_of_several = os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ
    return is_one_of_several and os.environ.get("LOCAL_RANK", "0") != "0"


def exit_code(error: BaseException) -> int:
    """`MISTAKE` for an error the user can correct in the command or its files, else `FAILED`."""
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code or FAILED
    is_wrong_name = isinstance(error, OSError) and error.errno in WRONG_NAMES
    return MISTAKE if is_wrong_name or isinstance(error, (ValueError, *WRONG_PATHS)) else FAILED
