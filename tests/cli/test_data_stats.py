"""`fastllama data stats`."""

import json
from pathlib import Path
from typing import Any

import pytest

from fastllama.cli import main
from fastllama.cli.errors import INTERRUPTED
from fastllama.data.manifest import Manifest
from fastllama.data.statistics import TokenCounts
from tests.cli.refusal import refusal
from tests.workspace import Workspace


def test_text_plot_and_json(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "stats.png"
    main(["data", "stats", str(workspace.data), "--plot", str(plot)])
    printed = capsys.readouterr()
    assert printed.err == ""
    splits = Manifest.load(workspace.data).splits
    for name, split in splits.items():
        assert f"{workspace.data} {name}\n  tokens      {split.tokens:,}\n" in printed.out
    assert plot.read_bytes().startswith(b"\x89PNG")
    main(["data", "stats", str(workspace.data), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert {name: (each["tokens"], each["documents"]) for name, each in found.items()} == {
        name: (split.tokens, split.documents) for name, split in splits.items()
    }


def test_mistakes(workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("data", "stats", workspace.data, "--plot")
    assert "is not a .png file: name one" in refusal(capsys, *command, tmp_path / "stats.txt")
    nowhere = tmp_path / "nowhere" / "stats.png"
    assert f"folder of the plot {nowhere} does not exist" in refusal(capsys, *command, nowhere)
    assert "does not exist" in refusal(capsys, "data", "stats", tmp_path / "data")


def test_ctrl_c(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(TokenCounts, "add", interrupt)
    with pytest.raises(SystemExit) as stop:
        main(["data", "stats", str(workspace.data), "--plot", str(tmp_path / "stats.png")])
    assert stop.value.code == INTERRUPTED
    assert not list(tmp_path.iterdir())
