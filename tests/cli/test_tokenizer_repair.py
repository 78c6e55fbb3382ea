"""`fastllama tokenizer repair`."""

import json
from pathlib import Path

import pytest

from fastllama.cli import main
from fastllama.data.manifest import Manifest
from fastllama.data.tokenizer import save_tokenizer, train_tokenizer
from tests.cli.refusal import refusal


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A tokenizer without the token of one byte of é, and a corpus that needs it."""
    content = json.loads(train_tokenizer([], 260).to_str())
    del content["model"]["vocab"]["©"]
    (tmp_path / "broken.json").write_text(json.dumps(content | {"decoder": None}))
    (tmp_path / "x.txt").write_text("café " * 300)
    return tmp_path / "broken.json"


def test_repaired_tokenizer_loses_nothing(
    broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "tokenizer.json"
    prepare = ["prepare", "--input", str(tmp_path / "x.txt"), "--output", str(tmp_path / "data")]
    strict = (*prepare, "--strict", "--tokenizer")
    assert "`fastllama tokenizer repair`" in refusal(capsys, *strict, broken)
    main(["tokenizer", "repair", "--tokenizer", str(broken), "--output", str(output)])
    summary, following = capsys.readouterr().out.splitlines()
    assert summary.startswith(f"{output}: 261 entries, 1 of them new, fingerprint ")
    assert following.startswith(f"next: fastllama prepare --input … --tokenizer {output}")
    main([*strict, str(output)])
    assert Manifest.load(tmp_path / "data").text_loss is None


def test_mistakes(broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("tokenizer", "repair", "--tokenizer")
    save_tokenizer(train_tokenizer([], 260), tmp_path / "whole.json")
    output = ("--output", tmp_path / "out.json")
    assert "whole.json: it needs no repair" in refusal(
        capsys, *command, tmp_path / "whole.json", *output
    )
    assert "gpt2 does not exist" in refusal(capsys, *command, "gpt2", *output)
    assert "is a folder" in refusal(capsys, *command, broken, "--output", tmp_path)
    assert not (tmp_path / "out.json").exists()
