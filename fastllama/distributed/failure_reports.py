"""What a failing rank says: a sentence on stderr, and the same sentence to torchrun."""

import json
import os
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

from fastllama.distributed.flight_recorder import dump_path
from fastllama.errors import EXPECTED, sentence
from fastllama.printable import printable


def words_of(error: BaseException) -> str:
    """What failed, on one line."""
    if isinstance(error, SystemExit):
        return f"sys.exit({error.code!r}) was called in the middle of the run"
    kind = "" if isinstance(error, EXPECTED) else f"{type(error).__name__}: "
    return f"{kind}{sentence(error)}"


def report_first_failure(rank: int, error: BaseException) -> None:
    """Print the error of the rank that failed first, and give its sentence to torchrun."""
    expected = isinstance(error, EXPECTED)
    report_failure(f"rank {rank}: {words_of(error)}")
    if (dumps := dump_path()) and not expected:
        print(
            f"collectives: after a timeout, {dumps}RANK holds the last collectives of each rank",
            file=sys.stderr,
        )
    if not expected:
        print_traceback(error)
    sys.stderr.flush()


PEER_SECONDS_LATER = 10
"""How much later torchrun takes the failure of a peer to be.

torchrun calls the earliest failure the root cause. A killed process leaves no file, so its failure
has the time at which torchrun notices it, and peers may have written theirs before.
"""


def report_failure(sentence: str, seconds_later: int = 0) -> None:
    """Print the sentence of a failure, and give it to torchrun."""
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    report_to_torchrun(sentence, seconds_later)


def print_traceback(error: BaseException) -> None:
    """Print the traceback of `error` on stderr. Its message may hold text from a file."""
    lines = "".join(traceback.format_exception(error))
    print(printable(lines, keep="\n"), end="", file=sys.stderr)


def report_to_torchrun(sentence: str, seconds_later: int = 0) -> None:
    """Make `sentence` the last line of torchrun's report; without torchrun, do nothing."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        # torchrun reads the error file with the earliest timestamp and prints its `py_callstack`.
        timestamp = str(int(time.time()) + seconds_later)
        extra = {"py_callstack": sentence, "timestamp": timestamp}
        message = {"message": sentence, "extraInfo": extra}
        # The exit code says the same, so a full disk loses only the sentence.
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": message}))
