import json
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

import fastllama.data.tokenizer as module
from fastllama.data.tokenizer import (
    SPECIAL_TOKENS,
    WORD_CHARACTERS,
    check_writable,
    end_token_id,
    fingerprint,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
    verify_round_trip,
    vocabulary_size,
)

CORPUS = [
    "the cat sat on the mat",
    "the dog sat on the log",
    "naïve café 日本語\r\n\tend <EOS>",
] * 5
TOKENIZER = train_tokenizer(CORPUS, vocab_size=300)

unicode_text = st.text(st.characters(exclude_categories=["Cs"]))
text_with_special_tokens = st.lists(st.sampled_from(SPECIAL_TOKENS) | unicode_text).map("".join)


def foreign_tokenizer(*names: str, special: Sequence[str] = ()) -> Tokenizer:
    tokenizer = Tokenizer(WordLevel({name: index for index, name in enumerate(names)}, names[0]))
    tokenizer.add_special_tokens(list(special))
    return tokenizer


@settings(deadline=None)
@given(text_with_special_tokens)
def test_round_trip_without_special_tokens(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text
    assert all(len(SPECIAL_TOKENS) <= token_id < vocabulary_size(TOKENIZER) for token_id in ids)
    verify_round_trip(TOKENIZER, [text])


def test_training_merges_after_special_tokens() -> None:
    assert [TOKENIZER.token_to_id(name) for name in SPECIAL_TOKENS] == [0, 1, 2, 3]
    assert TOKENIZER.get_vocab_size() == 300
    assert len(TOKENIZER.encode("the cat").ids) < len("the cat") // 2


def test_small_corpus_gives_small_vocabulary() -> None:
    assert train_tokenizer(["ab ab"], vocab_size=8192).get_vocab_size() < 270


def test_min_vocab_size() -> None:
    assert train_tokenizer(CORPUS, vocab_size=260).get_vocab_size() == 260
    with pytest.raises(ValueError, match=r"259 is too small.*260"):
        train_tokenizer(CORPUS, vocab_size=259)


def test_long_words_leave_ordinary_words_as_they_are() -> None:
    letters, spaces = "".join(random.Random(0).choices("ACGT", k=300_000)), " " * 300_000
    numbers, signs = "1½Ⅷ" * 100_000, "!\x1c_" * 100_000
    started = time.process_time()
    tokenizer = train_tokenizer([*CORPUS, letters, spaces, numbers, signs], vocab_size=1000)
    # A minute if each merge passes over a whole word.
    assert time.process_time() - started < 10
    # The vocabulary spells bytes, at most three for each of these characters.
    assert max(map(len, tokenizer.get_vocab())) <= 3 * 2 * WORD_CHARACTERS
    assert tokenizer.decode(tokenizer.encode(letters).ids) == letters
    draw = random.Random(1)
    lines = ("=" * 80 + "\n") * 20
    words = ["x" * WORD_CHARACTERS, f"a{' ' * WORD_CHARACTERS}b", "-é_1" * 3000, "1a" * 600, lines]
    limit = [*CORPUS, *(" ".join(draw.choices(words, k=9)) for _ in range(20))]
    assert train_tokenizer(limit, 400).to_str() == untouched(limit, 400).to_str()


def untouched(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A tokenizer as the library trains it, without a limit of words."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "new" / "tokenizer.json"
    save_tokenizer(TOKENIZER, path)
    loaded = load_tokenizer(path)
    text = "the café <EOS>"
    assert loaded.encode(text).ids == TOKENIZER.encode(text).ids
    assert fingerprint(loaded) == fingerprint(TOKENIZER)


def test_ignores_truncation_padding_and_dropout(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    truncating = Tokenizer.from_str(TOKENIZER.to_str())
    truncating.enable_truncation(2)
    truncating.enable_padding(length=100)
    assert fingerprint(truncating) == fingerprint(TOKENIZER)
    truncating.model.dropout = 0.9
    save_tokenizer(truncating, path)
    text = "the cat sat on the mat"
    loaded = load_tokenizer(path)
    assert loaded.encode(text).ids == TOKENIZER.encode(text).ids
    assert fingerprint(loaded) == fingerprint(TOKENIZER)


def test_fingerprint_ignores_formatting_but_not_content(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    content = json.loads(TOKENIZER.to_str())
    path.write_text(json.dumps(dict(reversed(content.items())), indent=7))
    assert fingerprint(load_tokenizer(path)) == fingerprint(TOKENIZER)
    content["model"]["merges"].pop()
    path.write_text(json.dumps(content))
    assert fingerprint(load_tokenizer(path)) != fingerprint(TOKENIZER)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"tokenizer\.json does not exist: train one"),
        (b"nonsense", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"\x0a\x09piece\x15\x00", "not the vocabulary of another library"),
        (b"{}", "is not a tokenizer"),
        (b"[]", "is not a tokenizer"),
        (Tokenizer(WordLevel({}, "a")).to_str().encode(), "has no tokens"),
        (
            Tokenizer(WordLevel({"a": 0}, "a"))
            .to_str()
            .replace('"a":0', '"a":4294967295')
            .encode(),
            "has a token with the id 4,294,967,295, more than 16,777,216",
        ),
    ],
)
def test_rejects_bad_files(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(path)


def test_rejects_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder"):
        load_tokenizer(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is not a regular file"):
        load_tokenizer(tmp_path / "pipe")


def test_rejects_large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tokenizer(TOKENIZER, tmp_path / "tokenizer.json")
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 1000)
    with pytest.raises(ValueError, match="is larger than 1,000 bytes"):
        load_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("name", ["gpt2", "meta-llama/Llama-3.2-1B", "mistral_7b"])
def test_names_of_a_hub_are_explained(name: str) -> None:
    remedy = f"downloads nothing: .*https://huggingface.co/{name}/resolve/main/tokenizer.json"
    with pytest.raises(ValueError, match=remedy):
        load_tokenizer(Path(name))


@pytest.mark.parametrize("url", ["file:///x/tok.json", "https://host/a:/tok.json", "hf://o/n"])
def test_urls_are_explained(url: str) -> None:
    with pytest.raises(ValueError, match=f"tokenizer {url} is a URL: download it, and name the"):
        load_tokenizer(Path(url))


def test_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(TOKENIZER.to_str(), encoding="utf-8-sig")
    assert fingerprint(load_tokenizer(path)) == fingerprint(TOKENIZER)


@pytest.mark.parametrize("name", ["<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>"])
def test_finds_usual_end_tokens(name: str) -> None:
    assert end_token_id(foreign_tokenizer("a", "b", name, special=[name])) == 2


def test_end_token_by_name_or_by_order() -> None:
    tokenizer = foreign_tokenizer("</s>", "<EOS>", "stop", special=["stop", "</s>", "<EOS>"])
    assert end_token_id(tokenizer) == 1
    assert end_token_id(tokenizer, "stop") == 2
    with pytest.raises(ValueError, match=r"'halt'.*--end-token to one of .*\(</s>, <EOS>, stop\)"):
        end_token_id(tokenizer, "halt")
    with pytest.raises(ValueError, match=r"--end-token to one of .*\(none\)"):
        end_token_id(foreign_tokenizer("a"))


def test_end_token_must_be_special() -> None:
    tokenizer = foreign_tokenizer("a", "</s>", "the", special=["stop"])
    tokenizer.add_tokens(["added"])
    with pytest.raises(ValueError, match=r"none of the usual .* one of .*\(stop\)$"):
        end_token_id(tokenizer)
    for ordinary in ("the", "</s>", "added"):
        with pytest.raises(ValueError, match=f"{ordinary}' is not a special token .*\\(stop\\)"):
            end_token_id(tokenizer, ordinary)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (".", "is a folder: name a file in it"),
        ("file/tokenizer.json", "file is not a writable folder: choose another"),
        ("pipe", "pipe is not a file: choose another"),
        ("new/..", "new/.. ends in no name: choose another"),
    ],
)
def test_check_writable_rejects(tmp_path: Path, output: str, message: str) -> None:
    # Executable: for a folder this bit is the permission to enter it.
    (tmp_path / "file").touch(mode=0o777)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=message):
        check_writable(tmp_path / output)
    for good in ("file", "new.json", "new/deeper/tokenizer.json"):
        check_writable(tmp_path / good)
    assert not (tmp_path / "new").exists()


def test_only_a_tokenizer_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "my only copy"}')
    with pytest.raises(ValueError, match=r"corpus\.jsonl exists and is not a tokenizer"):
        check_writable(path)
    save_tokenizer(TOKENIZER, path)
    check_writable(path)


def test_check_writable_in_read_only_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Root can write everywhere, so changing the mode of the folder would have no effect.
    monkeypatch.setattr(os, "access", lambda folder, mode: folder != tmp_path)
    with pytest.raises(ValueError, match=f"because {tmp_path} is not a writable folder"):
        check_writable(tmp_path / "new" / "tokenizer.json")


def test_vocabulary_size_includes_gaps() -> None:
    assert vocabulary_size(Tokenizer(WordLevel({"a": 0, "b": 9}, "a"))) == 10


def test_lossy_tokenizer_fails_round_trip() -> None:
    with pytest.raises(ValueError, match="does not return the text 'x y'"):
        verify_round_trip(foreign_tokenizer("unknown", "a"), ["a", "x y"])


def test_round_trip_ignores_template_tokens() -> None:
    tokenizer = Tokenizer.from_str(TOKENIZER.to_str())
    tokenizer.post_processor = TemplateProcessing("<SOS> $A", special_tokens=[("<SOS>", 0)])
    verify_round_trip(tokenizer, ["the cat"])
