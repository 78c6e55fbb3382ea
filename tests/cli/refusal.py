"""Commands that must end in a mistake."""

from pathlib import Path

import pytest

from fastllama.cli import main
from fastllama.cli.errors import MISTAKE


def refusal(capsys: pytest.CaptureFixture[str], *args: str | Path) -> str:
    """Run a command that must print nothing but one error; return this line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    assert stop.value.code == MISTAKE
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    return printed.err
