"""Repaired tokenizers, and decoders that a tokenizer lacks."""

import json
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import Metaspace

from fastllama.data.tokenizer import fingerprint, train_tokenizer, verify_round_trip
from fastllama.data.tokenizer_variants import (
    continuing,
    description,
    is_lossless,
    missing_bytes,
    repaired,
    with_decoder,
)
from tests.data import foreign

EVERY_BYTE = "".join(map(chr, range(0x800))) + "日本語 🦙"


def changed(tokenizer: Tokenizer, **parts: Any) -> Tokenizer:
    content = json.loads(tokenizer.to_str()) | parts
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.encode_special_tokens = True
    return tokenizer


def ascii_only(tokenizer: Tokenizer) -> Tokenizer:
    """A byte-level tokenizer without the tokens of other bytes, so its ids have gaps."""
    model = json.loads(tokenizer.to_str())["model"]
    model["vocab"] = {k: v for k, v in model["vocab"].items() if k.lstrip("Ġ").isascii()}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    return changed(tokenizer, model=model, decoder=None)


def test_repaired_byte_level_represents_every_text() -> None:
    broken = ascii_only(foreign.byte_level())
    assert len(missing_bytes(description(broken))) > 150
    tokenizer = repaired(broken)
    assert is_lossless(description(tokenizer))
    verify_round_trip(tokenizer, [EVERY_BYTE])
    before, after = broken.get_vocab(), tokenizer.get_vocab()
    assert after.items() >= before.items()
    assert min(after[name] for name in after.keys() - before.keys()) == max(before.values()) + 1
    text = " ".join(foreign.CORPUS[:1])
    assert tokenizer.encode(text).ids == broken.encode(text).ids
    assert fingerprint(repaired(broken)) == fingerprint(tokenizer)


@pytest.mark.parametrize("kind", ["without pre-tokenizer", "unigram"])
def test_repaired_vocabulary_falls_back_to_bytes(kind: str) -> None:
    broken = foreign.ALL[kind]()
    tokenizer = repaired(broken)
    ids = tokenizer.encode("the 日 cat é 🦙").ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == "the 日 cat é 🦙"
    text = "the cat sat on a mat"
    assert tokenizer.encode(text).ids == broken.encode(text).ids
    assert tokenizer.get_vocab().items() >= broken.get_vocab().items()


def test_incomplete_bytes_are_completed() -> None:
    once = repaired(foreign.unigram())
    content = description(once)
    content["model"]["byte_fallback"] = False
    again = repaired(Tokenizer.from_str(json.dumps(content)))
    assert again.get_vocab() == once.get_vocab()
    assert description(again)["model"]["byte_fallback"]


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        (train_tokenizer([], 260), "needs no repair"),
        (repaired(foreign.unigram()), "needs no repair"),
        (foreign.word_piece(), "a WordPiece model cannot fall back to bytes"),
        (foreign.words("the"), "a WordLevel model cannot"),
    ],
)
def test_kinds_without_repair(tokenizer: Tokenizer, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        repaired(tokenizer)


def test_added_tokens_after_a_unigram_vocabulary_stop_the_repair() -> None:
    tokenizer = foreign.unigram()
    tokenizer.add_special_tokens(["<extra>"])
    with pytest.raises(ValueError, match="would take the ids of its added tokens"):
        repaired(tokenizer)


def test_two_tokens_with_one_id() -> None:
    model = json.loads(foreign.without_pre_tokenizer().to_str())["model"]
    # The library keeps one of the two tokens, and the merges name both.
    model["vocab"]["t"] = model["vocab"]["h"]
    broken = changed(foreign.without_pre_tokenizer(), model=model)
    with pytest.raises(ValueError, match=r"the tokenizer contradicts itself \(Token `.*` out of"):
        continuing(broken)


def test_a_decoder_alone_is_repaired() -> None:
    broken = changed(foreign.byte_level(), decoder=None)
    assert repaired(broken).get_vocab() == broken.get_vocab()
    verify_round_trip(repaired(broken), [EVERY_BYTE])


def test_missing_decoders() -> None:
    text = "the cat sat"
    for kind in ("byte level", "split by pattern", "unigram"):
        complete = foreign.ALL[kind]()
        broken = changed(complete, decoder=None)
        ids = broken.encode(text).ids
        assert broken.decode(ids) != text
        assert with_decoder(broken).decode(ids) == text
        assert with_decoder(complete) is complete
    assert isinstance(with_decoder(changed(foreign.unigram(), decoder=None)).decoder, Metaspace)
    words = foreign.words("the", "cat")
    assert with_decoder(words).decode(words.encode("the cat").ids) == "the cat"
