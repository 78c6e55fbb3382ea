"""Encodes texts to token ids, each text followed by the end token."""

from collections.abc import Iterator, Sequence

from tokenizers import Tokenizer


class Encoder:
    """Encodes batches of documents with one tokenizer, in parallel."""

    def __init__(self, tokenizer: Tokenizer, end_token_id: int) -> None:
        self._tokenizer = tokenizer
        self._end_token_id = end_token_id

    def encode(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """Yield the token ids of each text. The last id is the end token."""
        # Without the special tokens of the tokenizer's own template.
        for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            yield [*encoding.ids, self._end_token_id]
