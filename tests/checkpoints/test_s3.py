"""Copies of checkpoints in S3."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastllama import urls
from fastllama.checkpoints.reading import find_damage
from fastllama.checkpoints.remote import CheckpointUploader, fetch_newest, list_checkpoints
from fastllama.config import CheckpointConfig, Config
from fastllama.run_folder import RunFolder
from tests.s3_server import NEEDS_S3, Server, s3_server

pytestmark = NEEDS_S3
STEP_5, STEP_10 = "step-00000005", "step-00000010"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(urls, "PAUSES_S", (0.0, 0.0))
    with s3_server() as server:
        yield server


def test_checkpoints_go_to_a_bucket_and_come_back(
    run: Path, server: Server, tmp_path: Path
) -> None:
    reports: list[str] = []
    options = CheckpointConfig(upload="s3://bucket/runs", keep_last=1)
    uploader = CheckpointUploader(RunFolder(run), Config(checkpoint=options), reports.append)

    def upload(name: str) -> list[str]:
        uploader.upload(run / "checkpoints" / name)
        assert uploader.wait(60)
        return list(list_checkpoints("s3://bucket/runs/run"))

    assert upload(STEP_5) == []
    assert (
        "cannot write s3://bucket/runs/run/config.toml: The specified bucket does not"
        in (reports[-1])
    )
    files, _ = urls.file_system("s3://bucket")
    files.mkdir("bucket")
    server.on_request = lambda method, path: (
        ("503 Slow Down", {}, b"") if method == "PUT" and path.endswith(".safetensors") else None
    )
    assert upload(STEP_5) == []
    assert "safetensors: 3 tries failed, the last with" in reports[-1]
    server.reset()
    assert upload(STEP_5) == [STEP_5]
    assert upload(STEP_10) == [STEP_10]
    assert files.find("bucket/runs/run/checkpoints") == [
        f"bucket/runs/run/checkpoints/{STEP_10}/{path.name}"
        for path in sorted((run / "checkpoints" / STEP_10).iterdir())
    ]
    identity = json.loads((run / "checkpoints" / STEP_5 / "progress.json").read_text())["identity"]
    assert all(fetch_newest("s3://bucket/runs/run", tmp_path / "new", identity, reports.append))
    assert find_damage(tmp_path / "new" / STEP_10) is None
    # The run went back, and saves an earlier update.
    shutil.rmtree(run / "checkpoints" / STEP_10)
    assert upload(STEP_5) == [STEP_5]
    assert "passed-over-manifest.json" in reports[-1]
