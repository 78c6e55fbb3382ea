"""Checkpoints: complete or absent, damage found before use, nothing that could run code."""

import json
import shutil
from pathlib import Path

import pytest

from fastllama.checkpoint import find_damage, newest_checkpoint, remove_old
from fastllama.cli import main
from tests.fastllama.conftest import Workspace


@pytest.fixture(scope="module")
def trained(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    main(["train", str(workspace.recipe), "--run-dir", str(run)])
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def test_layout(run: Path) -> None:
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["latest", "step-00000005", "step-00000010"]
    files = sorted(path.name for path in (run / "checkpoints" / "latest").iterdir())
    assert files[:2] == ["manifest.json", "progress.json"]
    assert [Path(name).suffix for name in files[2:]] == [".safetensors"]


@pytest.mark.parametrize("name", ["progress.json", "shard-00001-model-00001-of-00001.safetensors"])
def test_flipped_bit_is_found_and_passed_over(
    run: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = run / "checkpoints" / "step-00000010"
    content = bytearray((newest / name).read_bytes())
    content[len(content) // 2] ^= 1
    (newest / name).write_bytes(content)
    assert find_damage(newest) == f"{newest / name} is not what was written"
    main(["train", "--resume", str(run)])
    printed = " ".join(capsys.readouterr().out.split())
    assert "Passing over a damaged checkpoint" in printed
    assert "resuming after update 5 of 10" in printed
    assert find_damage(newest) is None
    (newest / name).unlink()
    with pytest.raises(SystemExit):
        main(["generate", str(newest)])
    assert "is missing" in capsys.readouterr().err


def test_missing_or_unfinished_checkpoints_do_not_count(run: Path) -> None:
    checkpoints = run / "checkpoints"
    (checkpoints / "step-00000010" / "manifest.json").unlink()
    shutil.copytree(checkpoints / "step-00000005", checkpoints / ".step-00000015.partial")
    path, damage = newest_checkpoint(checkpoints)
    assert path == checkpoints / "step-00000005"
    assert len(damage) == 1


def test_remove_old_keeps_the_newest(run: Path) -> None:
    checkpoints = run / "checkpoints"
    remove_old(checkpoints / "step-00000010", keep_last=1)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step-00000010"]
    assert find_damage(checkpoints / "latest") is None


def test_a_damaged_newer_checkpoint_does_not_outlive_a_good_one(run: Path) -> None:
    checkpoints = run / "checkpoints"
    (checkpoints / "step-00000010" / "manifest.json").unlink()
    remove_old(checkpoints / "step-00000005", keep_last=1)
    assert [path.name for path in checkpoints.glob("step-*")] == ["step-00000005"]


def test_leftovers_of_a_killed_process_go_with_the_next_checkpoint(run: Path) -> None:
    for name in (".step-00000007.partial", ".step-00000001.removed"):
        (run / "checkpoints" / name).mkdir()
    main(["train", "--resume", str(run), "--training.training-tokens", str(11 * 256)])
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["latest", "step-00000005", "step-00000010", "step-00000011"]


def test_tied_embeddings_are_saved_once_and_generate(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "checkpoints" / "tied"
    options = ["--model.tied-embeddings", "true"]
    main(["train", str(workspace.recipe), "--run-dir", str(run), *options])
    capsys.readouterr()
    main(["generate", str(run), "--prompt", "def", "--max-new-tokens", "4"])
    assert capsys.readouterr().out.startswith("def")


def test_unreadable_manifest_is_damage(run: Path) -> None:
    newest = run / "checkpoints" / "step-00000010"
    for content in ("", "[]", json.dumps({"files": 3})):
        (newest / "manifest.json").write_text(content)
        assert find_damage(newest) is not None
