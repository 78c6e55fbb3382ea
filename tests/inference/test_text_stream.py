"""Streamed text is what the tokenizer decodes from prompt and continuation at once."""

import json
import random

import pytest
from tokenizers import Tokenizer

from fastllama.data.tokenizer import train_tokenizer
from fastllama.data.tokenizer_variants import repaired
from fastllama.inference.text_stream import TextStream
from tests.data import foreign

PROMPTS = ["", "the cat", "the cat ", " the", "naïve 日", "a\n\n"]
BYTES = {
    "bytes of Llama 2": lambda: repaired(foreign.without_pre_tokenizer()),
    "bytes of Unigram": lambda: repaired(foreign.unigram()),
    "no merges": lambda: train_tokenizer([], 260),
}


def stream(tokenizer: Tokenizer, prompt: list[int], new: list[int]) -> list[str]:
    text = TextStream(tokenizer, prompt)
    return [*map(text.add, new), text.finish()]


@pytest.mark.parametrize("kind", [*foreign.ALL, *BYTES])
def test_any_ids(kind: str) -> None:
    tokenizer = (foreign.ALL | BYTES)[kind]()
    draw = random.Random(0)
    ids = sorted(tokenizer.get_vocab().values())
    compared = 0
    for _ in range(300):
        prompt = tokenizer.encode(draw.choice(PROMPTS), add_special_tokens=False).ids
        # Few different ids, so that pairs and runs of them are frequent.
        new = draw.choices(draw.choices(ids, k=4), k=draw.randrange(12))
        before = tokenizer.decode(prompt, skip_special_tokens=False)
        whole = tokenizer.decode(prompt + new, skip_special_tokens=False)
        if whole.startswith(before):
            compared += 1
            assert before + "".join(stream(tokenizer, prompt, new)) == whole
    # A byte that makes the last bytes of the prompt invalid changes the prompt itself.
    assert compared > 250


@pytest.mark.parametrize("kind", [*foreign.ALL, *BYTES])
def test_text(kind: str) -> None:
    tokenizer = (foreign.ALL | BYTES)[kind]()
    text = "the cat sat on a mat"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    for split in range(len(ids)):
        before = tokenizer.decode(ids[:split], skip_special_tokens=False)
        pieces = stream(tokenizer, ids[:split], ids[split:])
        assert (before + "".join(pieces)).lstrip() == text


def test_space_before_the_first_new_word() -> None:
    tokenizer = foreign.unigram()
    prompt, new = (tokenizer.encode(text).ids for text in ("the cat", "sat"))
    assert "".join(stream(tokenizer, prompt, new)) == " sat"


def test_pieces_are_whole_characters() -> None:
    tokenizer = train_tokenizer([], 260)
    text = "naïve 日本 🦙!"
    pieces = stream(tokenizer, [], tokenizer.encode(text).ids)
    assert [piece for piece in pieces if piece] == list(text)


def test_bytes_that_fall_back_wait_for_the_end_of_their_run() -> None:
    tokenizer = repaired(foreign.unigram())
    valid = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "é".encode()]
    word = tokenizer.encode("the").ids
    assert [p for p in stream(tokenizer, word, [*valid, word[0]]) if p] == ["é "]
    # One byte more, and the decoder takes none of them for a character.
    broken = stream(tokenizer, word, [*valid, valid[0], word[0]])
    assert [p for p in broken if p] == ["\ufffd\ufffd\ufffd "]


def test_vocabulary_without_decoder() -> None:
    content = json.loads(foreign.byte_level().to_str()) | {"decoder": None}
    tokenizer = Tokenizer.from_str(json.dumps(content))
    new = tokenizer.encode(" naïve cat").ids
    assert "".join(stream(tokenizer, tokenizer.encode("the").ids, new)) == " naïve cat"
