"""`fastllama data import`."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from fastllama.cli import main
from tests.cli.refusal import refusal
from tests.workspace import Workspace

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()


def test_command_of_the_page(
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On files of nanoGPT that hold the tokens of another data folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("nanoGPT/data/openwebtext", "gpt2"):
        Path(name).mkdir(parents=True)
    Path("gpt2/tokenizer.json").write_bytes(workspace.tokenizer.read_bytes())
    for split, name in (("train", "train.bin"), ("validation", "val.bin")):
        shards = sorted(workspace.data.glob(f"{split}-*.npy"))
        tokens = np.concatenate([np.load(shard) for shard in shards])
        tokens.tofile(f"nanoGPT/data/openwebtext/{name}")
    [command] = re.findall(r"^fastllama (data import --input nano(?:.*\\\n)+.*)", PAGE, re.M)
    main(shlex.split(command.replace("\\\n", "")))
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == (
        "next: fastllama train CONFIG.toml --data.path data/openwebtext"
    )
    assert re.search(r"^data/openwebtext train: [\d,]+ tokens in \d+ documents$", printed.out, re.M)
    assert "token files: 2 (raw-uint16, uint16), " in printed.err
    assert "is read for training" not in printed.err
    main(["data", "check", "data/openwebtext"])
    # The shards are others: 100,000,000 tokens each, not 3,000.
    for split in ("train", "validation"):
        shards = sorted(workspace.data.glob(f"{split}-*.npy"))
        expected = np.concatenate([np.load(shard) for shard in shards])
        assert np.load(f"data/openwebtext/{split}-00000.npy").tolist() == expected.tolist()


def test_mistakes(workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "data"
    command = ("data", "import", "--tokenizer", workspace.tokenizer, "--output", output)
    assert "input '/nowhere' matches no file" in refusal(capsys, *command, "--input", "/nowhere")
    np.array([5, 6, 7000], "<u2").tofile(tmp_path / "a.bin")
    printed = refusal_after_notes(capsys, *command, "--input", tmp_path / "a.bin")
    assert "a.bin, read as raw-uint16, has token id 7000 at position 2" in printed
    assert not output.exists()
    named = ("--input", tmp_path / "a.bin", "--format", "pickle")
    assert "invalid choice 'pickle'" in refusal(capsys, *command, *named)


def refusal_after_notes(capsys: pytest.CaptureFixture[str], *args: str | Path) -> str:
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]
