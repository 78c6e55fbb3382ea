"""Cuts long texts into pieces whose token ids, joined, are the ids of the whole text.

Encoding a text takes about 150 times its size in memory, so a long document is encoded in pieces.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

PIECE_CHARACTERS = 2**18
WINDOW = 1024
"""Characters on each side of a cut that are split twice, with the cut and without."""
TRIES = 8
PLACES = tuple(
    re.compile(pattern)
    for pattern in (
        r"(?<=[A-Za-z])(?= [A-Za-z])",
        r"(?<=\S\n)(?=\S)",
        r"(?<=\w)(?=[^\w\s])",
    )
)
"""Places where the usual pre-tokenizers end a word: before the space between two words, after a
line, and before a punctuation mark."""


class Cutter:
    """Cuts texts for one tokenizer. `forced_cuts` counts the cuts inside words.

    Each of `splits` gives what must not change, the words or the token ids of a text. Words are
    encoded alone, and the usual pre-tokenizers find them from left to right, looking one character
    ahead. A cut that leaves the split of `WINDOW` characters around it unchanged then leaves the
    whole split unchanged. A piece without such a place is cut after a line, before a punctuation
    mark, or at its end.
    """

    def __init__(self, *splits: Callable[[str], Sequence[Any]]) -> None:
        self._splits = splits
        self.forced_cuts = 0

    def pieces(self, text: str) -> Iterator[str]:
        """Yield `text` in pieces of at most `PIECE_CHARACTERS` characters."""
        start = 0
        while len(text) - start > PIECE_CHARACTERS:
            cut = self._find_cut(text, start)
            yield text[start:cut]
            start = cut
        yield text[start:]

    def _find_cut(self, text: str, start: int) -> int:
        end = start + PIECE_CHARACTERS
        best = end
        for pattern in PLACES:
            places = [match.start() for match in pattern.finditer(text, end - WINDOW, end)]
            places = places or [
                match.start()
                for match in pattern.finditer(text, start + PIECE_CHARACTERS // 2, end)
            ]
            for cut in reversed(places[-TRIES:]):
                if self._is_harmless(text, cut):
                    return cut
            if best == end and places:
                best = places[-1]
        self.forced_cuts += 1
        return best

    def _is_harmless(self, text: str, cut: int) -> bool:
        left, right = text[max(0, cut - WINDOW) : cut], text[cut : cut + WINDOW]
        return all(
            [*split(left), *split(right)] == [*split(left + right)] for split in self._splits
        )
