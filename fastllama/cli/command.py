"""What a file of this package tells the table of commands."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """One command of `fastllama`."""

    run: Callable[[list[str]], None]
    """Takes the arguments after the command's name."""
    forms: dict[str, str]
    """Lines of `fastllama --help`: the arguments of each form, and one line on what it does."""
