"""The console that training and `prepare` print on, and its Ctrl-C."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import rich.console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from fastllama.printable import printable


class Console(rich.console.Console):
    """Prints text as it is: nothing in it is markup, an emoji code, or a terminal's control."""

    def __init__(self, *, stderr: bool = False, quiet: bool = False) -> None:
        super().__init__(
            stderr=stderr, quiet=quiet, soft_wrap=True, markup=False, emoji=False, highlight=False
        )

    def print(self, *objects: Any, **options: Any) -> None:
        """Print `objects`; control characters in strings are shown as escapes."""
        harmless = (
            printable(each, keep="\n\t") if isinstance(each, str) else each for each in objects
        )
        super().print(*harmless, **options)


def token_bar(console: Console) -> Progress:
    """A progress bar for tasks with the fields `documents`, `tokens` and `rate` (tokens/s)."""
    return Progress(
        BarColumn(),
        TaskProgressColumn(),
        TextColumn(
            "{task.fields[documents]:,} documents, {task.fields[tokens]:,} tokens, "
            "{task.fields[rate]:,.0f} tokens/s"
        ),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )


@contextmanager
def ctrl_c_ends_process() -> Iterator[None]:
    """Let SIGINT end this process at once, where it leaves nothing half-written.

    Python calls its handler between two steps of Python code. A call of compiled code that takes
    minutes would hold the signal back until it returns. Only the main thread can change this; other
    threads change nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
