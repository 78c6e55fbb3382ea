"""Reading checkpoints: damage, other runs, old runs, and files that try to run code."""

import contextlib
import dataclasses
import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastllama.checkpoints.reading as module
from fastllama.checkpoints.folder import CheckpointManifest, FileEntry, describe
from fastllama.checkpoints.reading import find_damage, load_tensors, newest_checkpoint
from fastllama.checkpoints.state import MODEL
from fastllama.cli import main
from fastllama.inference.load import load_run
from fastllama.run_folder import RunFolder
from tests.runs import losses, train
from tests.workspace import Workspace

SHARD = "shard-00001-model-00001-of-00001.safetensors"


def more_updates(n_updates: int) -> tuple[str, str]:
    """The option that lengthens the run to this many updates."""
    return "--training.training-tokens", str(n_updates * 256)


def write_manifest(checkpoint: Path) -> None:
    """Describe all files of the checkpoint anew."""
    names = {path.name for path in checkpoint.iterdir()} - {"manifest.json"}
    manifest = CheckpointManifest(describe(checkpoint, names))
    (checkpoint / "manifest.json").write_text(json.dumps(dataclasses.asdict(manifest)))


def flip_bit(path: Path, position: int = -1) -> None:
    """Flip a bit of the byte at `position`, by default the last."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def record_reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose contents are read from now on."""
    read: list[Path] = []

    def recording_describe(folder: Path, names: list[str]) -> dict[str, FileEntry]:
        read.extend(folder / name for name in names)
        return describe(folder, names)

    monkeypatch.setattr(module, "describe", recording_describe)
    return read


def test_run_folder_whose_name_is_not_utf8(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moved = run.rename(run.with_name("caf\udce9"))
    train("--resume", moved, *more_updates(12))
    assert "resuming after update 10 of 12" in " ".join(capsys.readouterr().out.split())
    main(["generate", str(moved)])


@pytest.mark.parametrize("name", ["progress.json", SHARD])
def test_checkpoint_with_flipped_bit_is_not_used(
    run: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = run / "checkpoints" / "step-00000010"
    flip_bit(newest / name, (newest / name).stat().st_size // 2)
    damaged = (newest / name).read_bytes()
    assert find_damage(newest) == f"{newest / name} is not what was written"
    train("--resume", run)
    printed = " ".join(capsys.readouterr().out.split())
    assert f"Not using a checkpoint: {newest / name} is not what was written." in printed
    assert (run / "checkpoints" / "passed-over-step-00000010-1" / name).read_bytes() == damaged
    assert "resuming after update 5 of 10" in printed
    assert find_damage(newest) is None
    (newest / name).unlink()
    with pytest.raises(SystemExit):
        main(["generate", str(newest)])
    assert "is missing" in capsys.readouterr().err


def test_incomplete_checkpoints_are_not_used(run: Path) -> None:
    checkpoints = run / "checkpoints"
    (checkpoints / "step-00000010" / "manifest.json").unlink()
    shutil.copytree(checkpoints / "step-00000005", checkpoints / ".step-00000015.partial")
    path, unusable = newest_checkpoint(checkpoints, identity={})
    assert path == checkpoints / "step-00000005"
    assert list(unusable) == [checkpoints / "step-00000010"]


def test_truncated_shard(run: Path) -> None:
    newest = run / "checkpoints" / "step-00000010"
    os.truncate(newest / SHARD, 100)
    assert find_damage(newest) == f"{newest / SHARD} is not what was written"


ENTRY = {"bytes": 0, "sha256": ""}


@pytest.mark.parametrize(
    ("content", "damage"),
    [
        (b"", ": invalid JSON: "),
        (b"\xff", ": invalid JSON: "),
        (100_000 * b"[", ": invalid JSON: "),
        (b"[]", ": input should be an object, not []"),
        (b'{"files": 3}', ": files: input should be an object, not 3"),
        (b'{"files": {"a": 3}}', ": files.a: input should be an object, not 3"),
        (b'{"files": {"a": {"bytes": true, "sha256": ""}}}', ": files.a.bytes: input should be "),
        (b'{"files": {}}', " does not list progress.json"),
        *(
            (json.dumps({"files": {name: ENTRY}}).encode(), f" lists {name!r}, which is not a")
            for name in ("../outside", "/etc/passwd", "a/../b", ".", "..", "a\0b")
        ),
        (b'{"files": {"\\ud800": {"bytes": 0, "sha256": ""}}}', ": invalid JSON: "),
    ],
)
def test_unreadable_manifest(run: Path, content: bytes, damage: str) -> None:
    newest = run / "checkpoints" / "step-00000010"
    (newest / "manifest.json").write_bytes(content)
    path, unusable = newest_checkpoint(run / "checkpoints", identity={})
    assert path == run / "checkpoints" / "step-00000005"
    assert unusable[newest].startswith(f"{newest / 'manifest.json'}{damage}")


@pytest.mark.parametrize(
    ("content", "damage"),
    [
        (b"", ": invalid JSON: "),
        (b"{}", ": progress: field required"),
        (b'{"progress": {"step": 10.5}, "identity": {}}', ": progress.step: input should be "),
        (b'{"progress": {"later": 1}, "identity": {}}', ": progress.later: unexpected keyword"),
        (b'{"progress": {"step": -1}, "identity": {}}', ": progress.step: input should be "),
        (b'{"progress": {"position": 1e30}, "identity": {}}', ": progress.position: input "),
        (b'{"progress": {"spikes": [1]}, "identity": {}}', ": progress: value error, spikes must"),
        (b'{"progress": {}, "identity": []}', ": identity: input should be an object, not []"),
    ],
)
def test_progress_of_other_types(run: Path, content: bytes, damage: str) -> None:
    newest = run / "checkpoints" / "step-00000010"
    (newest / "progress.json").write_bytes(content)
    write_manifest(newest)
    path, unusable = newest_checkpoint(run / "checkpoints", identity={})
    assert path == run / "checkpoints" / "step-00000005"
    assert unusable[newest].startswith(f"{newest / 'progress.json'}{damage}")


@pytest.mark.parametrize("name", ["manifest.json", "progress.json", SHARD])
@pytest.mark.parametrize("kind", ["folder", "pipe", "link to itself", "dangling link"])
def test_special_files_are_damage(run: Path, name: str, kind: str) -> None:
    newest = run / "checkpoints" / "step-00000010"
    path = newest / name
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path.name if kind == "link to itself" else "nothing")
    damage = {
        "folder": "is not a regular file",
        "pipe": "is not a regular file",
        "link to itself": "cannot be read: Too many levels of symbolic links",
        "dangling link": "is missing",
    }
    assert find_damage(newest) == f"{path} {damage[kind]}"


@pytest.mark.parametrize("kind", ["file", "link to itself", "dangling link"])
def test_newer_name_that_is_no_folder(
    run: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    newer = run / "checkpoints" / "step-00000011"
    if kind == "file":
        newer.touch()
    else:
        newer.symlink_to(newer.name if kind == "link to itself" else "nothing")
    train("--resume", run, *more_updates(12))
    printed = " ".join(capsys.readouterr().out.split())
    assert f"Not using a checkpoint: {newer / 'manifest.json'} " in printed
    assert "It is kept as passed-over-step-00000011-1." in printed
    assert "resuming after update 10 of 12" in printed
    assert find_damage(run / "checkpoints" / "step-00000012") is None


@pytest.mark.parametrize("how", ["moved", "links followed", "without links"])
def test_copied_run_resumes(run: Path, tmp_path: Path, how: str) -> None:
    copied = tmp_path / "elsewhere" / "copied"
    if how == "moved":
        copied.parent.mkdir()
        run.rename(copied)
    else:
        ignore = shutil.ignore_patterns("latest") if how == "without links" else None
        shutil.copytree(run, copied, ignore=ignore)
    train("--resume", copied, *more_updates(12), "--checkpoint.keep-last", 1)
    names = {path.name for path in (copied / "checkpoints").glob("step-*")}
    assert names == {"step-00000012"}
    assert os.readlink(copied / "checkpoints" / "latest") == "step-00000012"


def test_unreadable_folder_is_not_an_empty_one(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(path: Path) -> list[str]:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("fastllama.checkpoints.folder.os.listdir", fail)
    # The run must not begin again from its first update.
    with pytest.raises(SystemExit) as stop:
        train("--resume", run, *more_updates(12))
    assert stop.value.code == 2
    assert f"{run / 'checkpoints'}: Permission denied; choose" in capsys.readouterr().err


@pytest.mark.parametrize("wanted", ["", MODEL])
def test_shard_of_another_user_is_not_missing(
    run: Path, monkeypatch: pytest.MonkeyPatch, wanted: str
) -> None:
    newest, original = run / "checkpoints" / "step-00000010", open

    def of_another_user(path: Path, *arguments: Any, **keywords: Any) -> Any:
        if path.name == SHARD:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return original(path, *arguments, **keywords)

    monkeypatch.setattr("builtins.open", of_another_user)
    assert find_damage(newest, wanted) == f"{newest / SHARD} cannot be read: Permission denied"


def test_unreadable_shard_is_one_sentence(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    newest = run / "checkpoints" / "step-00000010"
    (newest / SHARD).write_bytes(b"no header")
    with pytest.raises(ValueError, match=f"^{newest} cannot be loaded: "):
        load_tensors(newest, {"model.norm.weight": torch.zeros(32)})
    # PyTorch would print a traceback; its other loggers print nothing.
    assert "root" not in {record.name for record in caplog.records}


def test_shard_missing_from_manifest(run: Path) -> None:
    newest = run / "checkpoints" / "step-00000010"
    shutil.copy(newest / SHARD, newest / "shard-00002-model-00001-of-00001.safetensors")
    assert "is not in manifest.json" in str(find_damage(newest))


def test_ranks_share_the_reading(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest, read = run / "checkpoints" / "step-00000010", record_reads(monkeypatch)
    for rank in range(3):
        assert module._find_damage_in_share(newest, rank, 3, "") is None
    assert sorted(path.name for path in read) == ["progress.json", SHARD]
    os.truncate(newest / SHARD, 100)
    damages = [module._find_damage_in_share(newest, rank, 2, "") for rank in range(2)]
    assert sorted(damage is None for damage in damages) == [False, True]


def test_generation_reads_no_moments(
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Small files, so that weights and moments are in several files each.
    monkeypatch.setattr("fastllama.checkpoints.shards.FILE_BYTES", 2**13)
    run = tmp_path / "run"
    train(workspace.recipe, "--run-dir", run)
    newest = run / "checkpoints" / "step-00000010"
    shards = {path: set(load_file(path)) for path in newest.glob("*.safetensors")}
    with_weights = {
        path for path, names in shards.items() if any(name.startswith("model.") for name in names)
    }
    moments_only = shards.keys() - with_weights
    assert min(len(with_weights), len(moments_only)) >= 3
    with monkeypatch.context() as patch:
        read = record_reads(patch)
        for path in (run, newest):
            load_run(path, torch.device("cpu"))
            assert sorted(read) == sorted([*with_weights, newest / "progress.json"])
            read.clear()

    weights, moments = min(with_weights), min(moments_only)
    flip_bit(moments)
    assert find_damage(newest, MODEL) is None
    flip_bit(weights)
    assert find_damage(newest, MODEL) == f"{weights} is not what was written"
    flip_bit(weights)
    # Resuming needs the moments.
    train("--resume", run)
    assert f"{moments} is not what was written." in capsys.readouterr().out
    save_file({"optimizer.step": torch.zeros(1)}, moments)
    assert find_damage(newest, MODEL) == f"{moments} is not what was written"
    moments.unlink()
    assert find_damage(newest, MODEL) == f"{moments} is missing"


def test_checkpoint_of_another_run_is_not_used(
    run: Path, workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other_run = tmp_path / "checkpoints" / "other"
    one_layer = ["--model.n-layers", 1, *more_updates(11)]
    train(workspace.recipe, "--run-dir", other_run, *one_layer)
    checkpoints = run / "checkpoints"
    foreign = checkpoints / "step-00000011"
    shutil.copytree(other_run / "checkpoints" / "step-00000011", foreign)
    capsys.readouterr()
    train("--resume", run, *more_updates(12))
    printed = " ".join(capsys.readouterr().out.split())
    assert f"Not using a checkpoint: {foreign} was trained with model.n_layers = 1" in printed
    assert "resuming after update 10 of 12" in printed
    # The other run's checkpoint is kept under a name that nothing overwrites.
    assert find_damage(checkpoints / "passed-over-step-00000011-1") is None


def test_folder_of_another_tool_is_not_used(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    strange = run / "checkpoints" / "step-00000011"
    strange.mkdir()
    (strange / "model.safetensors").write_bytes(b"")
    train("--resume", run, *more_updates(12))
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{strange / 'manifest.json'} is missing" in printed
    assert "resuming after update 10 of 12" in printed


def edit_identity(checkpoint: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the saved identity of a checkpoint, and its manifest accordingly."""
    progress = checkpoint / "progress.json"
    content = json.loads(progress.read_text())
    edit(content["identity"])
    progress.write_text(json.dumps(content))
    write_manifest(checkpoint)


def test_other_data_is_named_by_its_folder(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for checkpoint in (run / "checkpoints").glob("step-*"):
        edit_identity(checkpoint, lambda saved: saved.update({"data.fingerprint": "1a2b" * 16}))
    data = RunFolder(run).load_config().data.path
    with pytest.raises(SystemExit) as stop:
        train("--resume", run, *more_updates(12))
    assert stop.value.code == 2
    message = " ".join(capsys.readouterr().err.split())
    assert f"with data.path = {data}, which had the fingerprint 1a2b1a2b1a2b, not " in message
    assert "; keep that value to resume, or start a new run with --run-dir." in message


def test_run_older_than_document_mask_resumes(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    edit_identity(newest, lambda identity: identity.pop("data.document_mask"))
    with pytest.raises(SystemExit) as stop:
        train("--resume", run, "--data.document-mask", "true", *more_updates(12))
    assert stop.value.code == 2
    message = " ".join(capsys.readouterr().err.split())
    assert f"{newest} was trained with data.document_mask = False, not True" in message
    train("--resume", run, *more_updates(12))
    assert "resuming after update 10 of 12" in capsys.readouterr().out


def test_run_older_than_logit_softcap_resumes(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = sorted((run / "checkpoints").glob("step-*"))
    for checkpoint in checkpoints:
        edit_identity(checkpoint, lambda identity: identity.pop("model.logit_softcap"))
        assert find_damage(checkpoint) is None
        assert "logit_softcap" not in (checkpoint / "progress.json").read_text()
    assert "logit_softcap" not in (run / "config.toml").read_text()
    # The option still belongs to the identity: a softcap would change the model.
    with pytest.raises(SystemExit) as stop:
        train("--resume", run, "--model.logit-softcap", 20, *more_updates(12))
    assert stop.value.code == 2
    message = " ".join(capsys.readouterr().err.split())
    assert f"{checkpoints[-1]} was trained with model.logit_softcap = None, not 20" in message

    train("--resume", run, *more_updates(12))
    printed = " ".join(capsys.readouterr().out.split())
    assert "resuming after update 10 of 12" in printed
    assert "Not using a checkpoint" not in printed
    assert list(losses(run)) == list(range(1, 13))


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.marker), "w")


@pytest.mark.parametrize("listed", [False, True], ids=["old manifest", "manifest lists the pickle"])
@pytest.mark.parametrize(
    "name", [SHARD, "progress.json", "manifest.json", ".metadata", "__0_0.distcp", "a.safetensors"]
)
def test_pickle_is_never_loaded(
    run: Path, tmp_path: Path, name: str, listed: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "code was run"
    newest = run / "checkpoints" / "step-00000010"
    (newest / name).write_bytes(pickle.dumps(Malicious(marker)))
    if listed and name != "manifest.json":
        write_manifest(newest)
    for command in (["generate", str(run)], ["train", "--resume", str(run), *more_updates(11)]):
        with contextlib.suppress(SystemExit):
            main(command)
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        assert not marker.exists()
    # A checkpoint that cannot be loaded is reported. The two names of PyTorch's own pickle format
    # are never read.
    if name not in (".metadata", "__0_0.distcp"):
        assert str(newest) in printed.out + printed.err
