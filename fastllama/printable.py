"""Makes text from files and file names safe to print on a terminal."""

import re

# Control characters drive a terminal, bidirectional controls reorder a line, a lone surrogate
# cannot be encoded. Joiners and marks of ordinary text stay.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object, keep: str = "") -> str:
    r"""`str(text)` with every control character escaped: ESC becomes `\x1b`, a newline `\n`.

    A byte of a file name that is not UTF-8 (a surrogate of `os.fsdecode`) becomes `\xe9`. The
    characters in `keep` stay, such as "\n\t" for a text of several lines.
    """
    return _UNSAFE.sub(
        lambda found: found[0] if found[0] in keep else _escaped(found[0]), str(text)
    )


def one_line(text: object, limit: int = 1000) -> str:
    """`str(text)` as one printable line of at most `limit` characters (10 or more).

    White space becomes single spaces. A text that is too long loses its middle, because an error
    ends with its remedy.
    """
    return shortened(printable(" ".join(str(text).split())), limit)


def shortened(text: str, limit: int) -> str:
    """`text`, without its middle if it is longer than `limit` characters (10 or more)."""
    if len(text) <= limit:
        return text
    tail = (limit - 5) // 3
    return f"{text[: limit - 5 - tail]} ... {text[-tail:]}"


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
