"""Encodes documents to token ids, each followed by the end token."""

import itertools
import re
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from fastllama.data.pieces import PIECE_CHARACTERS, Cutter
from fastllama.data.text_loss import LossMeter, TextLoss
from fastllama.data.tokenizer_variants import continuing, without_token
from fastllama.printable import one_line

BATCH_PIECES = 16
"""Pieces of a long document that are encoded at once."""


class Encoder:
    """Encodes documents with one tokenizer, in parallel and in bounded memory.

    The text that the tokenizer cannot represent is added to `loss`.
    """

    def __init__(self, tokenizer: Tokenizer, end_token_id: int, loss: TextLoss) -> None:
        self._end_token_id = end_token_id
        self._whole = TextEncoder(tokenizer, end_token_id)
        self._continuing = TextEncoder(continuing(tokenizer), end_token_id)
        self._cutter = Cutter(self._continuing.words, self._continuing.ids)
        self._meter = LossMeter(tokenizer, loss)

    @property
    def forced_cuts(self) -> int:
        """Number of cuts inside a word that is longer than `PIECE_CHARACTERS`."""
        return self._cutter.forced_cuts

    def encode(self, texts: Sequence[str]) -> Iterator[NDArray[np.uint32]]:
        """Yield the token ids of each text. The last id, and only the last, is the end token.

        Raises:
            ValueError: the tokenizer cannot encode a text.
        """
        short = [text for text in texts if len(text) <= PIECE_CHARACTERS]
        batch = self._whole.encode(short)
        self._meter.measure(short, batch)
        encoded = iter(batch)
        for text in texts:
            ids = next(encoded) if len(text) <= PIECE_CHARACTERS else self._encode_long(text)
            if self._whole.finds_end_token(ids):
                raise ValueError(
                    f"the tokenizer encodes text as {self._whole.end_token!r}, which ends "
                    f"documents (the text begins {text[:40]!r}): choose another special token "
                    "with --end-token, or another tokenizer"
                )
            yield np.append(ids, np.uint32(self._end_token_id))

    def _encode_long(self, text: str) -> NDArray[np.uint32]:
        first, *others = self._cutter.pieces(text)
        starts = range(0, len(others), BATCH_PIECES)
        batches = [(self._whole, [first])]
        batches += [(self._continuing, others[i : i + BATCH_PIECES]) for i in starts]
        encoded = [encoder.encode_once(pieces) for encoder, pieces in batches]
        if any(self._whole.finds_end_token(ids) for ids in itertools.chain(*encoded)):
            encoded = [encoder.encode_without_entry(pieces) for encoder, pieces in batches]
        for (_, pieces), ids in zip(batches, encoded, strict=True):
            self._meter.measure(pieces, ids)
        return np.concatenate([*itertools.chain(*encoded)])


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
            self.encode_without_entry([text])[0] if self.finds_end_token(ids) else ids
            for text, ids in zip(texts, self.encode_once(texts), strict=True)
        ]

    def encode_once(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """As `encode`, but names of the end token may become end tokens."""
        return _encode(self._tokenizer, texts)

    def encode_without_entry(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """As `encode`, without the entry of the end token from the beginning."""
        return _encode(self._without_entry, texts)

    def finds_end_token(self, ids: NDArray[np.uint32]) -> bool:
        """Whether `ids` hold the end token."""
        return bool((ids == self._end_token_id).any())

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
    LossMeter(tokenizer, loss).measure([prompt], [np.array(ids, np.uint32)])
    return loss


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
    try:
        # Without the special tokens of the tokenizer's own template.
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    except Exception as error:  # The library raises nothing narrower.
        raise ValueError(
            f"the tokenizer cannot encode a text ({one_line(error, 200)}): use another tokenizer"
        ) from error
    return [np.array(encoding.ids, np.uint32) for encoding in encodings]
