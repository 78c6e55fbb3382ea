"""Counts the characters of texts that a tokenizer cannot represent."""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict
from tokenizers import Tokenizer

from fastllama.data.tokenizer_variants import (
    description,
    is_lossless,
    unknown_id,
    with_decoder,
)

SAMPLES = 10
WARNING_SHARE = 0.001


@dataclass
class TextLoss:
    """Characters that decoding does not return: `lost` of `characters`, with `samples` of them."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    characters: int = 0
    lost: int = 0
    samples: list[str] = field(default_factory=list)

    def add(self, text: str, decoded: str) -> None:
        """Count a text and the characters that its decoded token ids lack."""
        self.characters += len(text)
        # Some tokenizers put a space before a text, others drop the first one.
        if not {text, text.removeprefix(" ")}.isdisjoint({decoded, decoded.removeprefix(" ")}):
            return
        before, after = _characters(text), _characters(decoded)
        if text.startswith(" "):
            before[" "] -= 1
        elif decoded.startswith(" "):
            after[" "] -= 1
        lost = before - after
        self.lost += lost.total()
        self._add_samples(lost)

    def merge(self, later: "TextLoss") -> None:
        """Count the text of `later` as well."""
        self.characters += later.characters
        self.lost += later.lost
        self._add_samples(later.samples)

    def _add_samples(self, characters: Iterable[str]) -> None:
        new = [character for character in characters if character not in self.samples]
        self.samples = [*self.samples, *new][:SAMPLES]

    @property
    def is_large(self) -> bool:
        """Whether the share of lost characters deserves a warning."""
        return self.lost > WARNING_SHARE * self.characters

    def __str__(self) -> str:
        share = self.lost / max(1, self.characters)
        # A quoted character also drives no terminal.
        samples = " ".join(map(repr, self.samples))
        return f"{self.lost:,} of {self.characters:,} characters ({share:.2%}): {samples}"


class LossMeter:
    """Measures the text that one tokenizer cannot represent."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        content = description(tokenizer)
        self._decoder = None if is_lossless(content) else with_decoder(tokenizer)
        unknown = unknown_id(content)
        self._unknown = "" if unknown is None else str(tokenizer.id_to_token(unknown))

    def measure(
        self, texts: Sequence[str], batch: Sequence[NDArray[np.uint32]], loss: TextLoss
    ) -> None:
        """Compare `texts` with the texts that their token ids decode to, and count in `loss`."""
        if self._decoder is None:
            loss.characters += sum(map(len, texts))
            return
        ids = [token_ids.tolist() for token_ids in batch]
        decoded = self._decoder.decode_batch(ids, skip_special_tokens=False)
        for text, returned in zip(texts, decoded, strict=True):
            loss.add(text, returned.replace(self._unknown, "") if self._unknown else returned)


def _characters(text: str) -> Counter[str]:
    """How often `text` has a character. Canonically equal spellings, as of é, are equal."""
    return Counter(unicodedata.normalize("NFC", text))
