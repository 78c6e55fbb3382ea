"""The console prints text as it is, and drives no terminal."""

import pytest

from fastllama.console import Console


def test_text_is_data(capsys: pytest.CaptureFixture[str]) -> None:
    text = "[bold]12[/bold] :heart: $A_$B %s {} " + 30 * "words " + "\nnext"
    Console().print(text)
    assert capsys.readouterr().out == text + "\n"
    Console(stderr=True).print("\x1b[2J\r\x9b \udcff", 3)
    assert capsys.readouterr().err == "\\x1b[2J\\r\\x9b \\xff 3\n"
    Console(quiet=True).print("nothing")
    assert capsys.readouterr().out == ""
