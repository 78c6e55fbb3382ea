"""From text to a trained model that writes, one command after another."""

from pathlib import Path

import pytest

from fastllama.cli import main
from tests.cli.refusal import refusal
from tests.workspace import Workspace


def test_own_data_to_text(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer, data, run = (tmp_path / name for name in ("new/tokenizer.json", "data", "run"))
    corpus = str(workspace.corpus)
    main(
        ["tokenizer", "train", "--input", corpus, "--vocab-size", "300", "--output", str(tokenizer)]
    )
    assert "300 entries" in capsys.readouterr().out
    prepare = ["prepare", "--input", corpus, "--tokenizer", str(tokenizer), "--output", str(data)]
    main(prepare)
    assert "in 80 documents" in capsys.readouterr().out
    main(["data", "check", str(data)])
    assert "every shard matches its checksum" in capsys.readouterr().out
    main(["train", str(workspace.recipe), f"--data.path={data}", "--run-dir", str(run)])
    assert f"next    fastllama generate {run}" in capsys.readouterr().out
    texts = []
    for where in (run, run, run / "checkpoints" / "step-00000005"):
        main(["generate", str(where), "--prompt", "def", "--max-new-tokens", "12", "--seed", "3"])
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("def")
    assert len(texts[0]) > len("def\n")
    assert texts[0] == texts[1] != texts[2]
    assert "--top-p must be" in refusal(capsys, "generate", run, "--top-p", "0")
    long = "def " * 40
    assert "context is 32" in refusal(capsys, "generate", run, "--prompt", long)
