"""`fastllama data check`."""

import shutil
from pathlib import Path

import pytest

from tests.cli.refusal import refusal
from tests.workspace import Workspace


def test_changed_byte(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(workspace.data, data)
    shard = data / "validation-00000.npy"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert "validation-00000.npy is damaged" in refusal(capsys, "data", "check", data)
