"""How a command fails: its exit code, one sentence on stderr, and its report to torchrun."""

import json
import os
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

from fastllama.distributed.flight_recorder import dump_path
from fastllama.errors import PeerFailedError, RankFailedError, TrainingFailedError
from fastllama.printable import one_line, printable

FAILED = 1
MISTAKE = 2
# Differs from every failure, so that a scheduler can submit the same command again on this code.
STOPPED = 85
INTERRUPTED = 130

EXPECTED = (ValueError, OSError, TrainingFailedError)
"""Errors whose message is written for the user; any other error is a bug."""
REPORTED = (KeyboardInterrupt, PeerFailedError, RankFailedError, *EXPECTED)
"""Errors that `report` takes; Python prints the traceback of any other and exits with 1."""
WRONG_PATHS = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
"""OSErrors that are mistakes of the user; the others are failures of the machine."""


class UsageError(ValueError):
    """A command line that cannot be parsed."""


def report(error: BaseException, debug: bool) -> int:
    """Print one of the `REPORTED` errors on stderr and return the exit code.

    `debug` adds the traceback.
    """
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, PeerFailedError):
        # torchrun reports the ranks that have exited when it looks, and then ends the others.
        # Waiting leaves the report to the rank that failed first, which can say why.
        time.sleep(5)
        return FAILED
    if isinstance(error, RankFailedError):
        return report_first_failure(error, debug)
    # Every process makes the same mistake, so one process per node prints it. Another error may
    # differ between processes, so each prints its own.
    if os.environ.get("LOCAL_RANK", "0") == "0" or not isinstance(error, ValueError):
        if debug:
            print_traceback(error)
        print(f"error: {one_line(error)}", file=sys.stderr)
    return exit_code(error)


def report_first_failure(failure: RankFailedError, debug: bool) -> int:
    """Print the error of the rank that failed first, give it to torchrun, return the exit code."""
    error = failure.__cause__
    assert error is not None
    expected = isinstance(error, EXPECTED)
    kind = "" if expected else f"{type(error).__name__}: "
    sentence = f"rank {failure.rank}: {kind}{one_line(error)}"
    print(f"error: {sentence}", file=sys.stderr)
    if (dumps := dump_path()) and not expected:
        print(
            f"collectives: after a timeout, {dumps}RANK holds the last collectives of each rank",
            file=sys.stderr,
        )
    if debug or not expected:
        print_traceback(error)
    sys.stderr.flush()
    report_to_torchrun(sentence)
    return exit_code(error)


def print_traceback(error: BaseException) -> None:
    """Print the traceback of `error` on stderr. Its message may hold text from a file."""
    lines = "".join(traceback.format_exception(error))
    print(printable(lines, keep="\n"), end="", file=sys.stderr)


def report_to_torchrun(sentence: str) -> None:
    """Make `sentence` the last line of torchrun's report; without torchrun, do nothing."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        # torchrun reads the error file with the earliest timestamp and prints its `py_callstack`.
        extra = {"py_callstack": sentence, "timestamp": str(int(time.time()))}
        message = {"message": sentence, "extraInfo": extra}
        # The exit code says the same, so a full disk loses only the sentence.
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": message}))


def exit_code(error: BaseException) -> int:
    """`MISTAKE` for an error the user can correct in the command or its files, else `FAILED`."""
    return MISTAKE if isinstance(error, (ValueError, *WRONG_PATHS)) else FAILED
