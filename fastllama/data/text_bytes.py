"""Counts the UTF-8 bytes of the text that token ids stand for."""

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from fastllama.data.tokenizer import vocabulary_size
from fastllama.data.tokenizer_variants import description, steps, with_decoder


class TextBytes:
    """Counts the bytes of text with one tokenizer. Special tokens are no text.

    A byte-level vocabulary has a number of bytes for each token. Other tokenizers decode: a token
    of theirs may have another text at the beginning of a document.
    """

    def __init__(self, tokenizer: Tokenizer, end_token_id: int) -> None:
        self._end_token_id = end_token_id
        self._tokenizer = with_decoder(tokenizer)
        decoders = steps(description(self._tokenizer)["decoder"])
        is_byte_level = [part["type"] for part in decoders] == ["ByteLevel"]
        self._lengths = _bytes_of_tokens(tokenizer) if is_byte_level else None

    def count(self, ids: NDArray[np.integer], before: int | None = None) -> int:
        """Bytes of the text of `ids`: whole documents, each with its end token, or parts of one.

        `before` is the token before `ids` if they continue a document.
        """
        if self._lengths is not None:
            return int(self._lengths[ids].sum(dtype=np.int64))
        parts = np.split(ids, np.flatnonzero(ids == self._end_token_id) + 1)
        documents = [part.tolist() for part in parts]
        context = [] if before is None else [before]
        documents[0] = context + documents[0]
        texts = self._tokenizer.decode_batch([*documents, context], skip_special_tokens=True)
        *lengths, of_context = (len(text.encode()) for text in texts)
        return sum(lengths) - of_context


def _bytes_of_tokens(tokenizer: Tokenizer) -> NDArray[np.int32]:
    """Bytes of each token of a byte-level vocabulary, (vocab,). A special token has none."""
    alphabet = set(ByteLevel.alphabet())
    lengths = np.zeros(vocabulary_size(tokenizer), np.int32)
    for name, number in tokenizer.get_vocab(with_added_tokens=True).items():
        # Each character of the alphabet is a byte. An added token may have others: its own text.
        lengths[number] = len(name) if alphabet.issuperset(name) else len(name.encode())
    for number, token in tokenizer.get_added_tokens_decoder().items():
        if token.special:
            lengths[number] = 0
    return lengths
