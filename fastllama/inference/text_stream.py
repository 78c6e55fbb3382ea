"""Decodes token ids to text while they are generated."""

import re

from tokenizers import Tokenizer

from fastllama.data.tokenizer_variants import with_decoder

BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


class TextStream:
    """The text that follows a prompt, in pieces of whole characters.

    Joined, prompt and pieces are what the tokenizer decodes from all ids at once. Decoding the new
    ids alone would differ: many decoders drop the space before the first word.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: list[int]) -> None:
        self._tokenizer = with_decoder(tokenizer)
        # Ids before `_shown` are shown. Decoding starts one piece earlier, so that the first id of
        # what is decoded is never the first id of a new piece.
        self._ids = list(prompt_ids)
        self._start, self._shown = 0, len(prompt_ids)

    def add(self, token_id: int) -> str:
        """The text that is complete with this id, often empty."""
        self._ids.append(token_id)
        # Bytes that together are no UTF-8 each become U+FFFD, so a run of bytes must end first.
        if BYTE_TOKEN.fullmatch(self._tokenizer.id_to_token(token_id) or ""):
            return ""
        text = self._new_text()
        # A token may end inside a character. The decoder then returns U+FFFD until the rest comes.
        if not text or text.endswith("\ufffd"):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return text

    def finish(self) -> str:
        """The rest of the text, with U+FFFD for a character that is not complete."""
        return self._new_text()

    def _new_text(self) -> str:
        return self._decode(len(self._ids))[len(self._decode(self._shown)) :]

    def _decode(self, end: int) -> str:
        return self._tokenizer.decode(self._ids[self._start : end], skip_special_tokens=False)
