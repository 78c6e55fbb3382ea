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


def report_failure(sentence: str) -> None:
    """Print the sentence of a failure, and give it to torchrun."""
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    report_to_torchrun(sentence)


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
