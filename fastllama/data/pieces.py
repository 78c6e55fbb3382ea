"""Cuts long texts into pieces whose token ids, joined, are the ids of the whole text.

Encoding a text takes about 150 times its size in memory, so a long document is encoded in pieces.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

PIECE_CHARACTERS = 2**18
WINDOW = 4096
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

    `split` gives what must not change: the token ids of a text, or its words. Pre-tokenizers are
    regular expressions that look at most one character ahead, so a cut that leaves the split of
    `WINDOW` characters around it unchanged leaves the whole split unchanged. A piece without such a
    place is cut at its end.
    """

    def __init__(self, split: Callable[[str], Sequence[Any]]) -> None:
        self._split = split
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
        for pattern in PLACES:
            places = [match.start() for match in pattern.finditer(text, end - WINDOW, end)]
            places = places or [
                match.start()
                for match in pattern.finditer(text, start + PIECE_CHARACTERS // 2, end)
            ]
            for cut in reversed(places[-TRIES:]):
                if self._is_harmless(text, cut):
                    return cut
        self.forced_cuts += 1
        return end

    def _is_harmless(self, text: str, cut: int) -> bool:
        left, right = text[max(0, cut - WINDOW) : cut], text[cut : cut + WINDOW]
        return [*self._split(left), *self._split(right)] == [*self._split(left + right)]
