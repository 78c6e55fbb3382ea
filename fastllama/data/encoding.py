"""Encodes documents to token ids, each followed by the end token."""

import itertools
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from fastllama.data.pieces import Cutter
from fastllama.data.text_loss import LossMeter, TextLoss
from fastllama.data.tokenizer_variants import continuing, without_token
from fastllama.printable import one_line

BATCH_CHARACTERS = 6_000_000
"""Limit of the pieces that are encoded at once."""


@dataclass(frozen=True)
class EncodedTexts:
    """Token ids of some texts, and what encoding them lost and cut."""

    ids: list[NDArray[np.uint32]]
    """Of each text. The last id, and only the last, is the end token."""
    loss: TextLoss
    forced_cuts: int
    """Number of cuts inside words that are longer than `PIECE_CHARACTERS`."""


class Encoder:
    """Encodes documents with one tokenizer, in parallel and in bounded memory.

    Threads may encode at the same time.
    """

    def __init__(self, tokenizer: Tokenizer, end_token_id: int) -> None:
        self._end = np.array([end_token_id], np.uint32)
        self._whole = TextEncoder(tokenizer, end_token_id)
        without_space = continuing(tokenizer)
        is_same = without_space.to_str() == tokenizer.to_str()
        self._continuing = self._whole if is_same else TextEncoder(without_space, end_token_id)
        self._meter = LossMeter(tokenizer)

    def encode(self, texts: Sequence[str]) -> EncodedTexts:
        """Encode each text.

        Raises:
            ValueError: the tokenizer cannot encode a text.
        """
        cutter = Cutter(self._continuing.words, self._continuing.ids)
        loss = TextLoss()
        documents = [list(cutter.pieces(text)) for text in texts]
        encoded = self._encode_pieces(documents, loss)
        ids = []
        for text, pieces in zip(texts, documents, strict=True):
            ids.append(np.concatenate([*itertools.islice(encoded, len(pieces)), self._end]))
            if (ids[-1][:-1] == self._end).any():
                raise ValueError(
                    f"the tokenizer encodes text as {self._whole.end_token!r}, which ends "
                    f"documents (the text begins {text[:40]!r}): choose another special token "
                    "with --end-token, or another tokenizer"
                )
        return EncodedTexts(ids, loss, cutter.forced_cuts)

    def _encode_pieces(
        self, documents: list[list[str]], loss: TextLoss
    ) -> Iterator[NDArray[np.uint32]]:
        jobs = [
            (self._continuing if number else self._whole, piece)
            for pieces in documents
            for number, piece in enumerate(pieces)
        ]
        for encoder, group in itertools.groupby(jobs, key=lambda job: job[0]):
            for batch in _batches(piece for _, piece in group):
                encoded = encoder.encode(batch)
                self._meter.measure(batch, encoded, loss)
                yield from encoded


class TextEncoder:
    """Encodes text as nothing but text: the name of the end token becomes other tokens.

    Most tokenizers encode this name as ordinary text. Unigram, WordPiece and word-level models hold
    it in their vocabulary: a text in which they find it is encoded again without this entry. The
    end token remains only where it also stands for unknown text.
    """

    def __init__(self, tokenizer: Tokenizer, end_token_id: int) -> None:
        self._tokenizer = tokenizer
        self._end_token_id = end_token_id

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Token ids of each text.

        Raises:
            ValueError: the tokenizer cannot encode a text.
        """
        return [
            _encode(self._without_entry, [text])[0] if (ids == self._end_token_id).any() else ids
            for text, ids in zip(texts, _encode(self._tokenizer, texts), strict=True)
        ]

    @property
    def end_token(self) -> str:
        """The name of the end token."""
        return str(self._tokenizer.id_to_token(self._end_token_id))

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, with end tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def words(self, text: str) -> list[str]:
        """What the pre-tokenizer makes of a text. Without one, a word starts at each space."""
        normalizer, pre_tokenizer = self._tokenizer.normalizer, self._tokenizer.pre_tokenizer
        normalized = text if normalizer is None else normalizer.normalize_str(text)
        if pre_tokenizer is None:
            return re.findall("[ \u2581]?[^ \u2581]+|[ \u2581]", normalized)
        return [word for word, _ in pre_tokenizer.pre_tokenize_str(normalized)]

    @cached_property
    def _without_entry(self) -> Tokenizer:
        return without_token(self._tokenizer, self._end_token_id)


def encode_prompt(
    tokenizer: Tokenizer, prompt: str, end_token_id: int, special_tokens: bool = False
) -> list[int]:
    """Token ids of `prompt`. With `special_tokens`, the names of special tokens mean these tokens.

    Raises:
        ValueError: the tokenizer cannot encode the prompt.
    """
    if special_tokens:
        # `load_tokenizer` makes these names ordinary text.
        [ids] = _encode(Tokenizer.from_str(tokenizer.to_str()), [prompt])
    else:
        [ids] = TextEncoder(tokenizer, end_token_id).encode([prompt])
    return ids.tolist()


def prompt_loss(tokenizer: Tokenizer, prompt: str, end_token_id: int) -> TextLoss:
    """How much of `prompt`, read as text, the tokenizer cannot represent."""
    loss = TextLoss()
    ids = encode_prompt(tokenizer, prompt, end_token_id)
    LossMeter(tokenizer).measure([prompt], [np.array(ids, np.uint32)], loss)
    return loss


def _batches(pieces: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
    try:
        # Without the special tokens of the tokenizer's own template.
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    except Exception as error:  # The library raises nothing narrower.
        raise ValueError(
            f"the tokenizer cannot encode a text ({one_line(error, 200)}): use another tokenizer"
        ) from error
    # NumPy alone takes three times as long to convert a list.
    return [np.array(array("I", encoding.ids)) for encoding in encodings]
