"""Documents to token ids: no text encodes to the end token."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import Metaspace as MetaspaceDecoder
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Metaspace

from fastllama.data.encoding import Encoder, encode_prompt
from fastllama.data.prepare import prepare
from fastllama.data.tokenizer import save_tokenizer
from tests.data import foreign

TEXT = "the cat </s> sat"


def encode(tokenizer: Tokenizer, *texts: str) -> list[list[int]]:
    encoder = Encoder(tokenizer, tokenizer.token_to_id("</s>"))
    return [ids.tolist() for ids in encoder.encode(texts).ids]


@pytest.mark.parametrize("kind", foreign.ALL)
@pytest.mark.parametrize("text", [TEXT, "</s>", "a</s></s>b", "<unk> </ s>", ""])
def test_only_the_last_id_is_the_end_token(kind: str, text: str) -> None:
    tokenizer = foreign.ALL[kind]()
    end = tokenizer.token_to_id("</s>")
    before, ids, after = encode(tokenizer, "the cat", text, "the dog")
    assert ids.index(end) == len(ids) - 1
    assert before == [*tokenizer.encode("the cat", add_special_tokens=False).ids, end]
    assert after == [*tokenizer.encode("the dog", add_special_tokens=False).ids, end]


def test_unigram_encodes_the_name_of_the_end_token_as_pieces() -> None:
    tokenizer = foreign.unigram()
    end = tokenizer.token_to_id("</s>")
    assert end in tokenizer.encode(TEXT).ids
    [ids] = encode(tokenizer, TEXT)
    other = [i for i in tokenizer.encode(TEXT).ids if i != end]
    assert [i for i in ids if i in other] == other
    assert len(ids) > len(other) + 1


def test_unigram_with_two_entries_of_the_end_token(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = [*"▁abx</s>", "a</", "s>"]
    vocabulary = [("<unk>", 0.0), ("</s>", 0.0), *((piece, -9.0) for piece in pieces)]
    tokenizer = Tokenizer(Unigram([*vocabulary, ("</s>", -20.0)], unk_id=0))
    tokenizer.pre_tokenizer = Metaspace()
    tokenizer.decoder = MetaspaceDecoder()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.encode_special_tokens = True
    # Only "</s>" after "b" encodes to the end token.
    text = "b</s> " + "ab " * 100 + "a</s>"
    [whole] = encode(tokenizer, text)
    monkeypatch.setattr("fastllama.data.pieces.WINDOW", 20)
    monkeypatch.setattr("fastllama.data.pieces.PIECE_CHARACTERS", 100)
    assert encode(tokenizer, text) == [whole]
    assert tokenizer.decode(whole[:-1]) == text


def test_merges_into_the_end_token_are_undone() -> None:
    content = json.loads(foreign.byte_level().to_str())
    vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
    vocabulary["</"], vocabulary["</s"] = len(vocabulary), len(vocabulary) + 1
    merges[:0] = [["<", "/"], ["</", "s"], ["</s", ">"]]
    content["pre_tokenizer"]["use_regex"] = False
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.encode_special_tokens = True
    assert tokenizer.token_to_id("</s>") in tokenizer.encode(TEXT).ids
    [ids] = encode(tokenizer, TEXT)
    assert vocabulary["</s"] in ids
    assert tokenizer.decode(ids[:-1]) == TEXT


def test_unknown_text_as_the_end_token_is_rejected() -> None:
    tokenizer = foreign.words("the", unknown="</s>")
    assert encode(tokenizer, "the the") == [[3, 3, 2]]
    with pytest.raises(ValueError, match=r"encodes text as '</s>'.*begins 'the dog'.*--end-token"):
        encode(tokenizer, "the", "the dog")


def test_text_that_cannot_be_encoded_is_a_sentence() -> None:
    tokenizer = foreign.words("the", unknown="missing")
    with pytest.raises(ValueError, match=r"cannot encode a text \(.*\[UNK\].*use another"):
        encode(tokenizer, "the dog")


def test_data_has_one_end_token_per_document(tmp_path: Path) -> None:
    save_tokenizer(foreign.unigram(), tmp_path / "t.json")
    texts = [TEXT, "the dog", "</s>"]
    lines = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    prepare([str(tmp_path / "x.jsonl")], tmp_path / "t.json", tmp_path / "data")
    tokens = np.load(tmp_path / "data" / "train-00000.npy")
    assert (tokens == 2).sum() == len(texts)


def test_prompt_names_special_tokens_only_on_request() -> None:
    for tokenizer in (foreign.byte_level(), foreign.unigram()):
        end = tokenizer.token_to_id("</s>")
        assert end not in encode_prompt(tokenizer, TEXT, end)
        ids = encode_prompt(tokenizer, TEXT, end, special_tokens=True)
        assert ids.count(end) == 1
        # The tokenizer itself still takes them as text.
        assert end not in encode_prompt(tokenizer, TEXT, end)
