"""Long texts: encoded in pieces, they have the ids of the whole text."""

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import fastllama.data.prepare as module
from fastllama.data import pieces
from fastllama.data.encoding import Encoder
from fastllama.data.pieces import Cutter
from fastllama.data.tokenizer import save_tokenizer, train_tokenizer
from tests.data import foreign

LARGE = 10**9
FRAGMENTS = [
    "the cat sat on a mat. ",
    "def f(x):\n\treturn x\n",
    "it's a foo_bar—“q” ",
    "今天天气很好、我们去公园散步。",
    "한국어 ",
    "1234567",
    "   ",
    "\n\n  \n",
    "\r\n",
    "=====",
    "é e\u0301 🦙\u200d🔥",
    "</s> <EOS>",
    "aaaaaaaa",
]


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> "Limit":
    return Limit(monkeypatch)


class Limit:
    """Sets the size of a piece, in characters."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        monkeypatch.setattr(pieces, "WINDOW", 100)

    def set(self, characters: int) -> None:
        self._patch.setattr(pieces, "PIECE_CHARACTERS", characters)


def random_text(draw: random.Random) -> str:
    return "".join(draw.choices(FRAGMENTS, k=200))


@pytest.mark.parametrize("kind", foreign.ALL)
def test_pieces_have_the_ids_of_the_whole(limit: Limit, kind: str) -> None:
    tokenizer = foreign.ALL[kind]()
    end = tokenizer.token_to_id("</s>")
    draw = random.Random(0)
    exact = 0
    for _ in range(40):
        text = random_text(draw)
        limit.set(LARGE)
        [whole] = Encoder(tokenizer, end).encode([text]).ids
        limit.set(400)
        encoded = Encoder(tokenizer, end).encode([text])
        if not encoded.forced_cuts:
            exact += 1
            assert encoded.ids[0].tolist() == whole.tolist()
    # ▁ begins a word, so without spaces some texts have no place to cut.
    assert exact >= 10


def test_pieces_are_short_and_lose_nothing(limit: Limit) -> None:
    limit.set(300)
    cutter = Cutter(list)
    draw = random.Random(1)
    for text in (random_text(draw), "a" * 3001, "", "word " * 500):
        cut = list(cutter.pieces(text))
        assert "".join(cut) == text
        assert max(map(len, cut)) <= 300
        assert len(cut) <= 1 + len(text) // 150


def test_words_longer_than_a_piece_are_cut_and_counted(limit: Limit) -> None:
    tokenizer = foreign.byte_level(prefix_space=True)
    limit.set(1000)
    text = "the " + "acgt" * 1000
    encoded = Encoder(tokenizer, tokenizer.token_to_id("</s>")).encode([text])
    assert encoded.forced_cuts == 4
    # A piece that continues a word gets no space before it.
    assert tokenizer.decode(encoded.ids[0][:-1].tolist()) == " " + text


def test_prepare_counts_the_cuts_of_all_batches(
    limit: Limit,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    limit.set(1000)
    monkeypatch.setattr(module, "BATCH_RECORDS", 1)
    save_tokenizer(foreign.byte_level(prefix_space=True), tmp_path / "tokenizer.json")
    record = json.dumps({"text": "the " + "acgt" * 1000})
    (tmp_path / "long.jsonl").write_text(f"{record}\n{record}\n")
    text, tokenizer = [str(tmp_path / "long.jsonl")], tmp_path / "tokenizer.json"
    prepare = partial(module.prepare, text, tokenizer, tmp_path / "data")
    monkeypatch.setattr(module, "COMMIT_SECONDS", 0)
    commit = module._commit

    def stop(*arguments: Any) -> None:
        commit(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_commit", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare()
    # Four of them were cut before the interruption.
    prepare()
    assert "were cut at 8 places" in capsys.readouterr().err


def test_cut_is_left_out_where_a_word_would_change(limit: Limit) -> None:
    limit.set(100)
    text = "ab cd " * 30
    assert all(piece[0] == " " for piece in [*Cutter(str.split).pieces(text)][1:])
    by_two = Cutter(lambda text: [text[i : i + 2] for i in range(0, len(text), 2)])
    assert all(len(piece) % 2 == 0 for piece in by_two.pieces(text))


def test_training_counts_the_same_words_in_pieces(limit: Limit) -> None:
    draw = random.Random(2)
    texts = [random_text(draw) for _ in range(3)]
    limit.set(LARGE)
    whole = train_tokenizer(texts, 400)
    limit.set(300)
    assert train_tokenizer(texts, 400).to_str() == whole.to_str()
