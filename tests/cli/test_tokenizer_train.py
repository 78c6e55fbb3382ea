"""`fastllama tokenizer train`."""

from pathlib import Path

import pytest

from fastllama.cli import main
from tests.cli.refusal import refusal
from tests.workspace import Workspace


def test_output_is_checked_before_the_work(
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("fastllama.data.documents.read_documents", None)
    args = ("tokenizer", "train", "--input", workspace.corpus, "--output")
    assert "is a folder: name a file in it" in refusal(capsys, *args, tmp_path)
    (tmp_path / "file").touch()
    output = tmp_path / "file" / "tokenizer.json"
    assert "file is not a writable folder" in refusal(capsys, *args, output)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_replaced_tokenizer_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus, output = tmp_path / "x.txt", tmp_path / "tokenizer.json"
    corpus.write_text("some text")
    args = ["tokenizer", "train", "--input", str(corpus), "--vocab-size", "260", "--output"]
    note = f"note: the tokenizer {output} exists and will be replaced"
    main([*args, str(output)])
    assert note not in capsys.readouterr().err
    main([*args, str(output)])
    assert note in capsys.readouterr().err


def test_malformed_records_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = tmp_path / "x.jsonl"
    corpus.write_text('{"text": "a"}\n' + "[bold]\n" * 12 + '{"text": "b"}\n')
    args = ["tokenizer", "train", "--input", str(corpus), "--vocab-size", "260", "--output"]
    main([*args, str(tmp_path / "tokenizer.json")])
    printed = capsys.readouterr()
    *shown, total, of_file = printed.err.splitlines()
    assert [line.split(": ")[0] for line in shown] == [f"{corpus}:{n}" for n in range(2, 12)]
    assert total == "1 file read: 2 documents, 0 without text, 12 malformed"
    assert of_file.startswith(
        f"  {corpus}: 2 documents, 0 without text, 12 malformed; first at 2: "
    )
    summary, following = printed.out.splitlines()
    assert summary.endswith(", 12 malformed records skipped")
    assert following.startswith("next: ")
