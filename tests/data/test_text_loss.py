"""Text that a tokenizer cannot represent: counted, printed, recorded, rejected by --strict."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

import fastllama.data.prepare as module
from fastllama.data.encoding import Encoder, prompt_loss
from fastllama.data.manifest import Manifest
from fastllama.data.prepare import prepare
from fastllama.data.text_loss import TextLoss
from fastllama.data.tokenizer import save_tokenizer, train_tokenizer
from fastllama.data.tokenizer_variants import description, is_lossless
from tests.data import foreign

TEXT = "naïve café 日本語 text"


def incomplete() -> Tokenizer:
    """Byte-level BPE of ASCII text without the other bytes and without a decoder."""
    content = json.loads(train_tokenizer(["text cafe naive"], 264).to_str())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {
        name: i for name, i in vocabulary.items() if name.isascii() or name == "Ġ"
    }
    content["model"]["merges"] = []
    content["decoder"] = None
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.encode_special_tokens = True
    return tokenizer


def loss_of(tokenizer: Tokenizer, *texts: str) -> TextLoss:
    end = tokenizer.token_to_id("</s>") or 1
    return Encoder(tokenizer, end).encode(texts).loss


def test_missing_bytes() -> None:
    loss = loss_of(incomplete(), TEXT, "text", "é")
    assert (loss.characters, loss.lost) == (24, 6)
    assert loss.samples == ["ï", "é", "日", "本", "語"]
    assert str(loss) == "6 of 24 characters (25.00%): 'ï' 'é' '日' '本' '語'"


@pytest.mark.parametrize(
    ("kind", "text", "lost"),
    [
        ("byte level", TEXT + "</s>\n", ""),
        ("prefix space", TEXT + " ", ""),
        ("split by pattern", "e\u0301 " + TEXT, ""),
        ("without pre-tokenizer", "the cat, 1234 日", "日"),
        ("unigram", "the cat sat 日", "日"),
        ("word piece", "the cat\nsat", "\n"),
        ("word piece", "The cat", "T"),
        ("word piece", "the naïve cat", "ï"),
        ("word piece", "the ☃ cat", "☃"),
    ],
)
def test_tokenizers_of_all_kinds(kind: str, text: str, lost: str) -> None:
    assert "".join(loss_of(foreign.ALL[kind](), text).samples) == lost


@pytest.mark.parametrize(
    ("text", "decoded", "lost"),
    [
        ("a", " a", 0),
        (" a", "a", 0),
        # The decoder strips a space, and this piece of a document was encoded without one in front.
        ("  a", " a", 0),
        ("  aé", " a", 1),
        ("  a", "a", 1),
        ("a b", " ab", 1),
    ],
)
def test_one_space_in_front_is_not_lost(text: str, decoded: str, lost: int) -> None:
    loss = TextLoss()
    loss.add(text, decoded)
    assert (loss.characters, loss.lost) == (len(text), lost)


def test_unknown_token_does_not_hide_its_letters() -> None:
    assert loss_of(foreign.words("the"), "the unk").lost == len("unk")


def test_samples_are_few_and_drive_no_terminal() -> None:
    loss = TextLoss()
    loss.add("\x1b[1m\n" + "".join(map(chr, range(0x4E00, 0x4F00))), "")
    assert len(loss.samples) == 10
    assert "\x1b" not in str(loss)
    assert "\\x1b" in str(loss)


def test_lossless_tokenizers() -> None:
    assert is_lossless(description(train_tokenizer([], 260)))
    lossless = {kind for kind, make in foreign.ALL.items() if is_lossless(description(make()))}
    assert lossless == {"byte level", "prefix space"}
    assert not is_lossless(description(incomplete()))
    stripping = foreign.byte_level()
    stripping.add_tokens(["added"])
    assert not is_lossless(description(stripping))


def test_prompt() -> None:
    assert prompt_loss(incomplete(), "café", 1).lost == 1
    assert prompt_loss(train_tokenizer([], 260), "café", 1).lost == 0


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_tokenizer(incomplete(), tmp_path / "t.json")
    save_tokenizer(train_tokenizer([], 260), tmp_path / "complete.json")
    lines = [json.dumps({"text": text}) for text in [TEXT, *["text"] * 30]]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    return tmp_path


def run(source: Path, tokenizer: str = "t.json", strict: bool = False) -> Manifest:
    corpus, output = str(source / "x.jsonl"), source / "data"
    return prepare([corpus], source / tokenizer, output, strict=strict)


def test_prepare_says_and_records_what_is_lost(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loss = TextLoss(19 + 120, 5, ["ï", "é", "日", "本", "語"])
    assert run(source).text_loss == loss
    assert Manifest.load(source / "data").text_loss == loss
    sentence = (
        f"warning: the tokenizer cannot represent {loss}; if it lacks tokens for bytes, `fastllama"
    )
    assert sentence in capsys.readouterr().err
    run(source)
    assert sentence in capsys.readouterr().err


def test_small_share_is_a_note(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(source / "x.jsonl", "a") as file:
        file.write("\n" + json.dumps({"text": "text " * 2000}))
    run(source)
    assert "note: the tokenizer cannot represent 5 of" in capsys.readouterr().err


def test_prepare_without_loss_records_nothing(source: Path) -> None:
    assert run(source, "complete.json", strict=True).text_loss is None
    assert "text_loss" not in (source / "data" / "manifest.json").read_text()


def test_strict_rejects_lost_text(source: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot represent 5 of .* or leave out --strict"):
        run(source, strict=True)
    assert not (source / "data").exists()


def test_resume_counts_each_text_once(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(source).text_loss
    (source / "data").rename(source / "reference")
    monkeypatch.setattr(module, "COMMIT_SECONDS", 0)
    monkeypatch.setattr(module, "BATCH_RECORDS", 7)
    commit = module._commit

    def stop(*arguments: object) -> None:
        commit(*arguments)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_commit", stop)
        with pytest.raises(KeyboardInterrupt):
            run(source)
    assert run(source).text_loss == expected
