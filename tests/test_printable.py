import os

import pytest

from fastllama.printable import one_line, printable, shortened


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, naïve 日本語 🦙\u200d🔥", "plain, naïve 日本語 🦙\u200d🔥"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("a\nb\tc\rd", r"a\nb\tc\rd"),
        ("\x9b31m\x7f\x00", r"\x9b31m\x7f\x00"),
        ("a\u202eb\u2067c\u2028d", r"a\u202eb\u2067c\u2028d"),
        ("\ud800", r"\ud800"),
    ],
)
def test_control_characters_are_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown
    printable(text).encode()


def test_file_name_that_is_not_utf8() -> None:
    assert printable(os.fsdecode(b"lat\xe9.txt")) == r"lat\xe9.txt"


def test_kept_characters() -> None:
    assert printable("a\n\tb\x1b", keep="\n\t") == "a\n\tb\\x1b"


def test_one_line() -> None:
    assert one_line("a\n  b\x1b") == r"a b\x1b"


@pytest.mark.parametrize("limit", [10, 99, 1000])
def test_long_line_loses_its_middle(limit: int) -> None:
    line = one_line("head" + "x" * 10_000 + "tail", limit)
    assert len(line) == limit
    assert " ... " in line
    assert line[0] == "h"
    assert line[-1] == "l"


def test_shortened_keeps_white_space() -> None:
    assert shortened("a  b", 10) == "a  b"
    assert shortened("start of a long name  end", 14) == "start  ... end"
