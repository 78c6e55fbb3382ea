"""What `prepare` says about splits that leave nothing, or too little."""

import json
from pathlib import Path

import pytest

from fastllama.data.prepare import prepare
from fastllama.data.tokenizer import save_tokenizer, train_tokenizer


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_tokenizer(train_tokenizer([], 260), tmp_path / "t.json")
    (tmp_path / "one.txt").write_text("text " * 500)
    lines = [json.dumps({"text": f"{number}" * 2000}) for number in range(40)]
    (tmp_path / "many.jsonl").write_text("\n".join(lines))
    return tmp_path


def said(
    source: Path, capsys: pytest.CaptureFixture[str], name: str, fraction: float = 0.0
) -> list[str]:
    capsys.readouterr()
    output = source / f"{name}-{fraction}"
    prepare([str(source / name)], source / "t.json", output, validation_fraction=fraction)
    printed = capsys.readouterr().err.splitlines()
    return [line for line in printed if line.startswith(("warning", "note"))]


def test_nothing_to_say(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(source, capsys, "one.txt") == []
    assert said(source, capsys, "many.jsonl", 0.3) == []


def test_nothing_held_out(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [warning] = said(source, capsys, "one.txt", 0.001)
    assert "none of the documents (1) was held out for validation: raise" in warning
    assert "--validation-fraction 0.001, or give the text as more documents" in warning


def test_split_shorter_than_a_sequence(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (source / "few.txt").write_text("text")
    [warning] = said(source, capsys, "few.txt")
    assert "the train split has 5 tokens, and a sequence of 1,024 needs 1,025" in warning
    assert "prepare more text, or train with a smaller --model.max-seq-len" in warning
    lines = [json.dumps({"text": f"{number}"}) for number in range(2000)]
    (source / "short.jsonl").write_text("\n".join(lines))
    [warning] = said(source, capsys, "short.jsonl", 0.1)
    assert "the validation split has" in warning
    assert "raise --validation-fraction" in warning


def test_all_held_out_leaves_nothing_in_the_way(source: Path) -> None:
    inputs, output = [str(source / "one.txt")], source / "data"
    sentence = r"all documents \(1\) were held out .* lower --validation-fraction 0.9999, or give"
    for _ in range(2):
        with pytest.raises(ValueError, match=sentence):
            prepare(inputs, source / "t.json", output, validation_fraction=0.9999)
        assert not output.exists()
    output.mkdir()
    with pytest.raises(ValueError, match=sentence):
        prepare(inputs, source / "t.json", output, validation_fraction=0.9999, shard_tokens=100)
    manifest = prepare(inputs, source / "t.json", output)
    assert manifest.splits["train"].documents == 1
    assert {path.name for path in output.iterdir()} - {".lock"} == {
        "job.json",
        "manifest.json",
        "tokenizer.json",
        "train-00000.npy",
    }
