"""Checkpoints: complete or absent, damage found before use, nothing that could run code."""

import contextlib
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastllama.checkpoints.reading as module
from fastllama.checkpoints.folder import describe, remove_old
from fastllama.checkpoints.reading import find_damage, newest_checkpoint
from fastllama.checkpoints.state import MODEL
from fastllama.cli import main
from fastllama.config import CheckpointConfig, Config, TrainingConfig
from fastllama.inference.generate import load_run
from tests.workspace import Workspace

SHARD = "shard-00001-model-00001-of-00001.safetensors"


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


@pytest.mark.parametrize("name", ["progress.json", SHARD])
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
    assert f"Not using a checkpoint: {newest / name} is not what was written." in printed
    assert (run / "checkpoints" / "passed-over-step-00000010-1" / name).read_bytes() == content
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
    path, passed_over = newest_checkpoint(checkpoints, identity={})
    assert path == checkpoints / "step-00000005"
    assert list(passed_over) == [checkpoints / "step-00000010"]


def test_remove_old_keeps_the_newest(run: Path) -> None:
    checkpoints = run / "checkpoints"
    remove_old(checkpoints / "step-00000010", keep(last=1))
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step-00000010"]
    assert find_damage(checkpoints / "latest") is None


def keep(last: int, every_tokens: int = 0) -> Config:
    """Options of what is kept, in a run of 256 tokens an update."""
    return Config(
        training=TrainingConfig(tokens_per_update=256),
        checkpoint=CheckpointConfig(keep_last=last, keep_every_tokens=every_tokens),
    )


def test_the_first_checkpoint_at_or_after_each_multiple_stays(tmp_path: Path) -> None:
    kept = set()
    for step in range(3, 31, 3):
        (tmp_path / f"step-{step:08d}").mkdir()
        # Updates 8, 16, 24: the checkpoints after them are those of 9, 18 and 24.
        remove_old(tmp_path / f"step-{step:08d}", keep(last=2, every_tokens=8 * 256))
        kept = {int(path.name.removeprefix("step-")) for path in tmp_path.iterdir()}
        assert {9, 18, 24, step, step - 3} & set(range(3, step + 1)) == kept
    assert kept == {9, 18, 24, 27, 30}


def test_folders_of_others_are_neither_read_nor_removed(run: Path) -> None:
    checkpoints = run / "checkpoints"
    for name in ("step-final", "step-1", "checkpoint-20", "step-00000004.bak"):
        (checkpoints / name).mkdir()
    remove_old(checkpoints / "step-00000010", keep(last=1))
    left = sorted(path.name for path in checkpoints.iterdir())
    assert left == [
        "checkpoint-20",
        "latest",
        "step-00000004.bak",
        "step-00000010",
        "step-1",
        "step-final",
    ]


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


class Malicious:
    """Runs code of its own when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.marker), "w")


@pytest.mark.parametrize("consistent", [False, True], ids=["as it is", "with its own manifest"])
@pytest.mark.parametrize(
    "name", [SHARD, "progress.json", "manifest.json", ".metadata", "__0_0.distcp", "a.safetensors"]
)
def test_a_pickle_is_never_loaded(
    run: Path, tmp_path: Path, name: str, consistent: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "code was run"
    newest = run / "checkpoints" / "step-00000010"
    (newest / name).write_bytes(pickle.dumps(Malicious(marker)))
    if consistent and name != "manifest.json":
        names = {path.name for path in newest.iterdir()} - {"manifest.json"}
        files = {file: describe(newest, file)[file] for file in names}
        (newest / "manifest.json").write_text(json.dumps({"files": files}))
    more = ["--training.training-tokens", str(11 * 256)]
    for command in (["generate", str(run)], ["train", "--resume", str(run), *more]):
        with contextlib.suppress(SystemExit):
            main(command)
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        assert not marker.exists()
    # What cannot be loaded is named, and nothing of it is used.
    if name not in (".metadata", "__0_0.distcp"):
        assert str(newest) in printed.out + printed.err


def test_another_runs_checkpoint_is_passed_over_for_ones_own(
    run: Path, workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "checkpoints" / "other"
    options = ["--model.n-layers", "1", "--training.training-tokens", str(11 * 256)]
    main(["train", str(workspace.recipe), "--run-dir", str(other), *options])
    checkpoints = run / "checkpoints"
    foreign = checkpoints / "step-00000011"
    shutil.copytree(other / "checkpoints" / "step-00000011", foreign)
    capsys.readouterr()
    main(["train", "--resume", str(run), "--training.training-tokens", str(12 * 256)])
    printed = " ".join(capsys.readouterr().out.split())
    assert f"Not using a checkpoint: {foreign} was trained with model.n_layers = 1" in printed
    assert "resuming after update 10 of 12" in printed
    # It is someone's work: it is kept where nothing overwrites it.
    assert find_damage(checkpoints / "passed-over-step-00000011-1") is None


def test_another_tools_folder_is_passed_over(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    strange = run / "checkpoints" / "step-00000011"
    strange.mkdir()
    (strange / "model.safetensors").write_bytes(b"")
    main(["train", "--resume", str(run), "--training.training-tokens", str(12 * 256)])
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{strange / 'manifest.json'} is missing or unreadable" in printed
    assert "resuming after update 10 of 12" in printed


def test_a_shard_that_is_not_in_the_manifest_is_damage(run: Path) -> None:
    newest = run / "checkpoints" / "step-00000010"
    shutil.copy(newest / SHARD, newest / "shard-00002-model-00001-of-00001.safetensors")
    assert "is not in manifest.json" in str(find_damage(newest))


def test_each_rank_reads_a_share(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest, read = run / "checkpoints" / "step-00000010", []
    describe = module.describe
    monkeypatch.setattr(
        module, "describe", lambda path, name: (read.append(name), describe(path, name))[1]
    )
    for rank in range(3):
        assert module._find_damage_in_share(newest, rank, 3, "") is None
    assert sorted(read) == ["progress.json", SHARD]
    os.truncate(newest / SHARD, 100)
    found = [module._find_damage_in_share(newest, rank, 2, "") for rank in range(2)]
    assert sorted(wrong is None for wrong in found) == [False, True]


def flip(path: Path) -> None:
    """Change the last bit of a file."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_load_of_the_model_reads_no_moments(
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("fastllama.checkpoints.writing.FILE_BYTES", 2**13)
    run, describe = tmp_path / "run", module.describe
    main(["train", str(workspace.recipe), "--run-dir", str(run)])
    newest = run / "checkpoints" / "step-00000010"
    shards = {path: set(load_file(path)) for path in newest.glob("*.safetensors")}
    weights = {path for path, names in shards.items() if any(map(is_of_the_model, names))}
    moments = shards.keys() - weights
    assert min(len(weights), len(moments)) >= 3
    read = []
    with monkeypatch.context() as patch:
        patch.setattr(
            module,
            "describe",
            lambda path, name: (read.append(path / name), describe(path, name))[1],
        )
        for path in (run, newest):
            load_run(path, torch.device("cpu"))
            assert sorted(read) == sorted([*weights, newest / "progress.json"])
            read.clear()

    flip(min(moments))
    assert find_damage(newest, MODEL) is None
    flip(min(weights))
    assert find_damage(newest, MODEL) == f"{min(weights)} is not what was written"
    flip(min(weights))
    # To go on, the moments have to be right.
    main(["train", "--resume", str(run)])
    assert f"{min(moments)} is not what was written." in capsys.readouterr().out
    save_file({"optimizer.step": torch.zeros(1)}, min(moments))
    assert find_damage(newest, MODEL) == f"{min(moments)} is not what was written"
    min(moments).unlink()
    assert find_damage(newest, MODEL) == f"{min(moments)} is missing"


def is_of_the_model(name: str) -> bool:
    return name.startswith("model.")


def test_a_truncated_shard_is_damage(run: Path) -> None:
    newest = run / "checkpoints" / "step-00000010"
    os.truncate(newest / SHARD, 100)
    assert find_damage(newest) == f"{newest / SHARD} is not what was written"


def test_unreadable_manifest_is_damage(run: Path) -> None:
    newest = run / "checkpoints" / "step-00000010"
    for content in ("", "[]", json.dumps({"files": 3})):
        (newest / "manifest.json").write_text(content)
        assert find_damage(newest) is not None
