"""`fastllama data check`."""

import json
import shutil
from pathlib import Path

import pytest

from fastllama.cli import main
from tests.cli.refusal import refusal
from tests.workspace import Workspace


@pytest.fixture
def data(workspace: Workspace, tmp_path: Path) -> Path:
    return shutil.copytree(workspace.data, tmp_path / "data")


def test_whole_folder(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["data", "check", str(data)])
    assert "every shard matches its checksum\n" in capsys.readouterr().out


def test_changed_byte(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = data / "validation-00000.npy"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert "validation-00000.npy is damaged" in refusal(capsys, "data", "check", data)


def test_missing_tokenizer(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "tokenizer.json").unlink()
    assert "tokenizer.json is missing or damaged" in refusal(capsys, "data", "check", data)


def test_shard_left_out_of_the_list(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = data / "manifest.json"
    manifest = json.loads(path.read_text())
    [left_out, *_] = shards = manifest["splits"]["train"]["shards"]
    del shards[0]
    path.write_text(json.dumps(manifest))
    assert "differs from its checksum" in refusal(capsys, "data", "check", data)
    # A manifest of version 1 has no checksum, but its counts must add up, and so must its files.
    del manifest["checksum"]
    path.write_text(json.dumps({**manifest, "format_version": 1}))
    assert "the split train has" in refusal(capsys, "data", "check", data)
    manifest["splits"]["train"]["tokens"] -= left_out["tokens"]
    path.write_text(json.dumps({**manifest, "format_version": 1}))
    assert "train-00000.npy is not listed in" in refusal(capsys, "data", "check", data)


def test_manifest_without_a_checksum(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = data / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["checksum"]
    path.write_text(json.dumps({**manifest, "format_version": 1}))
    main(["data", "check", str(data)])
    assert "manifest.json has no checksum" in capsys.readouterr().out
