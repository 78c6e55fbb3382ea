"""Copies of checkpoints behind a URL: complete or invisible, and enough to go on from."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastllama import urls
from fastllama.checkpoints.reading import find_damage
from fastllama.checkpoints.remote import CheckpointUploader, fetch_newest, list_checkpoints
from fastllama.config import CheckpointConfig, Config, TrainingConfig
from fastllama.inference.load import load_run
from fastllama.run_folder import RunFolder
from tests.object_store import ObjectStore, fail, object_store
from tests.ranks import launch
from tests.runs import losses, train
from tests.workspace import Workspace

STEP_5, STEP_10 = "step-00000005", "step-00000010"
URL = "store://bucket/runs"
UPLOAD = ("--checkpoint.upload", URL)


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    monkeypatch.setattr(urls, "PAUSES_S", (0.0, 0.0))
    with object_store() as store:
        yield store


def tensors(checkpoint: Path) -> dict[tuple[str, str], bytes]:
    """The bits of all tensors. Their order in the files differs between trainings."""
    return {
        (path.name, name): tensor.numpy().tobytes()
        for path in checkpoint.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def copied(store: ObjectStore, name: str, run: str = "run") -> dict[str, bytes]:
    """The files of a checkpoint in the store."""
    folder = f"/bucket/runs/{run}/checkpoints/{name}/"
    return {
        path.removeprefix(folder): file.getvalue()
        for path, file in store.store.items()
        if path.startswith(folder)
    }


def whole(store: ObjectStore) -> list[str]:
    """Complete checkpoints in the store, each of which has all that its manifest lists."""
    found = list_checkpoints(f"{URL}/run")
    for name in found:
        files = copied(store, name)
        for file, entry in json.loads(files["manifest.json"])["files"].items():
            assert hashlib.sha256(files[file]).hexdigest() == entry["sha256"]
    return list(found)


def uploader(run: Path, url: str = URL, **options: Any) -> tuple[CheckpointUploader, list[str]]:
    reports: list[str] = []
    config = Config(
        training=TrainingConfig(tokens_per_update=10),
        checkpoint=CheckpointConfig(upload=url, **options),
    )
    return CheckpointUploader(RunFolder(run), config, reports.append), reports


def test_a_fresh_machine_goes_on_with_the_same_bits(
    workspace: Workspace,
    trained_run: Path,
    tmp_path: Path,
    store: ObjectStore,
    capsys: pytest.CaptureFixture[str],
) -> None:
    upload, _ = uploader(trained_run)
    upload.upload(trained_run / "checkpoints" / STEP_5)
    assert upload.wait(60)
    run = tmp_path / "run"
    train(workspace.recipe, "--run-dir", run, *UPLOAD)
    printed = capsys.readouterr().out
    assert f"downloaded {URL}/run/checkpoints/{STEP_5}" in printed
    assert "resuming after update 5 of 10" in printed
    assert f"uploaded {URL}/run/checkpoints/{STEP_10} (" in printed
    newest = run / "checkpoints" / STEP_10
    assert tensors(newest) == tensors(trained_run / "checkpoints" / STEP_10)
    reference = losses(trained_run)
    assert losses(run) == {step: reference[step] for step in range(6, 11)}
    assert whole(store) == [STEP_10, STEP_5]
    assert copied(store, STEP_10) == {path.name: path.read_bytes() for path in newest.iterdir()}
    for path in (run / "config.toml", run / "tokenizer.json"):
        assert store.store[f"/bucket/runs/run/{path.name}"].getvalue() == path.read_bytes()
    # On another fresh machine, nothing is left to train. The run folder is whole there, too.
    train(workspace.recipe, "--run-dir", tmp_path / "other" / "run", *UPLOAD)
    assert "has done all of its 10 updates" in capsys.readouterr().out
    assert load_run(tmp_path / "other" / "run", torch.device("cpu")).end_token == 1
    # A run with checkpoints of its own does not look at the copies.
    ObjectStore.on_request = fail(10**6, ConnectionResetError)
    train(workspace.recipe, "--run-dir", run, *UPLOAD)
    assert "has done all of its 10 updates" in capsys.readouterr().out


def test_a_branch_goes_on_from_its_own_copies(
    workspace: Workspace, trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    upload, _ = uploader(trained_run)
    upload.upload(trained_run / "checkpoints" / STEP_10)
    assert upload.wait(60)
    branch, start = tmp_path / "run", trained_run / "checkpoints" / STEP_5
    train("--resume", start, "--run-dir", branch, *UPLOAD)
    assert f"{branch} has done all of its 10 updates" in capsys.readouterr().out


@pytest.mark.slow
def test_two_ranks(workspace: Workspace, tmp_path: Path) -> None:
    def launched(run: Path, *options: object) -> None:
        arguments = ["train", workspace.recipe, "--run-dir", run, *map(str, options)]
        outcome = launch(2, arguments, tmp_path / "log")
        assert outcome.codes == (0, 0), outcome.printed

    copies = tmp_path / "copies"
    launched(tmp_path / "reference/run")
    launched(tmp_path / "run", "--checkpoint.upload", f"file://{copies}")
    shutil.rmtree(copies / "run/checkpoints" / STEP_10)
    resumed = tmp_path / "fresh/run"
    launched(resumed, "--checkpoint.upload", f"file://{copies}")
    assert list(losses(resumed)) == list(range(6, 11))
    for folder in (resumed / "checkpoints" / STEP_10, copies / "run/checkpoints" / STEP_10):
        assert tensors(folder) == tensors(tmp_path / "reference/run/checkpoints" / STEP_10)


def saved(run: Path, *steps: int) -> list[Path]:
    """Copies of the checkpoint of update 5 as those of other updates."""
    paths = [run / "checkpoints" / f"step-{step:08d}" for step in steps]
    for path in paths:
        if not path.exists():
            shutil.copytree(run / "checkpoints" / STEP_5, path)
    return paths


def test_a_copy_is_complete_or_invisible(run: Path, store: ObjectStore) -> None:
    upload, reports = uploader(run)
    newest = run / "checkpoints" / STEP_10
    n_files = len(list(newest.iterdir()))
    puts: list[str] = []

    def upload_files(n: int) -> None:
        """Upload the checkpoint, of which only the first `n` files arrive."""

        def cut(kind: str, path: str) -> None:
            if kind == "put" and STEP_10 in path:
                puts.append(path)
                if len(puts) > n:
                    raise ConnectionResetError(104, "Connection reset by peer")

        puts.clear()
        ObjectStore.on_request = cut
        upload.upload(newest)
        assert upload.wait(60)

    for n in range(n_files):
        upload_files(n)
        assert whole(store) == []
        assert upload.failure.endswith("Connection reset by peer; check the network")
        report = f"{upload.failure}; training continues, and the next one tries again."
        assert reports.pop() == report
    upload_files(n_files)
    assert not upload.failure
    assert whole(store) == [STEP_10]
    assert puts[-1].endswith("manifest.json")
    # The upload of one with the same name, after the run went back, hides it first.
    upload_files(1)
    assert whole(store) == []


def test_an_answer_without_the_file_is_a_failure(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload, reports = uploader(run)
    monkeypatch.setattr(ObjectStore, "put_file", lambda self, local, path: self.touch(path))
    upload.upload(run / "checkpoints" / STEP_10)
    assert upload.wait(60)
    assert "has 0 of" in reports[0]
    assert list_checkpoints(f"{URL}/run") == {}


def test_copies_are_kept_as_checkpoints_are(run: Path, store: ObjectStore) -> None:
    upload, _ = uploader(run, keep_last=2, keep_every_tokens=100)
    store.pipe_file(f"/bucket/runs/run/checkpoints/{STEP_5}/notes.txt", b"mine")
    for path in saved(run, 5, 10, 12, 14):
        upload.upload(path)
        assert upload.wait(60)
    assert whole(store) == ["step-00000014", "step-00000012", STEP_10]
    assert copied(store, STEP_5) == {"notes.txt": b"mine"}


def test_no_empty_folder_is_left_on_a_file_system(run: Path, tmp_path: Path) -> None:
    upload, reports = uploader(run, f"file://{tmp_path / 'copies'}", keep_last=1)
    copies = tmp_path / "copies" / "run" / "checkpoints"
    (copies / STEP_5).mkdir(parents=True)
    (copies / STEP_5 / "notes.txt").write_text("mine")
    for path in saved(run, 5, 10, 12):
        upload.upload(path)
        assert upload.wait(60)
    assert sorted(os.listdir(copies)) == [STEP_5, "step-00000012"]
    assert os.listdir(copies / STEP_5) == ["notes.txt"]
    assert all(report.startswith("uploaded ") for report in reports)


def test_a_permanent_checkpoint_is_uploaded_later(run: Path, store: ObjectStore) -> None:
    upload, reports = uploader(run, keep_last=1, keep_every_tokens=100)
    ObjectStore.on_request = fail(10**6, ConnectionResetError, "put")
    upload.upload(run / "checkpoints" / STEP_10)
    assert upload.wait(60)
    ObjectStore.on_request = None
    upload.upload(saved(run, 12)[0])
    assert upload.wait(60)
    assert whole(store) == ["step-00000012", STEP_10]
    assert len(reports) == 2


def test_what_failed_uploads_left_is_removed(run: Path, store: ObjectStore) -> None:
    upload, _ = uploader(run)
    ObjectStore.on_request = lambda kind, path: refuse_manifest(kind, path)
    upload.upload(run / "checkpoints" / STEP_5)
    assert upload.wait(60)
    assert len(copied(store, STEP_5)) > 1
    ObjectStore.on_request = None
    upload.upload(run / "checkpoints" / STEP_10)
    assert upload.wait(60)
    assert whole(store) == [STEP_10]
    assert copied(store, STEP_5) == {}


def refuse_manifest(kind: str, path: str) -> None:
    if kind == "put" and path.endswith("manifest.json"):
        raise ConnectionResetError(104, "Connection reset by peer")


def test_later_copies_are_passed_over(run: Path, store: ObjectStore) -> None:
    upload, reports = uploader(run)
    for name in (STEP_10, STEP_5):
        upload.upload(run / "checkpoints" / name)
        assert upload.wait(60)
    assert whole(store) == [STEP_5]
    assert reports[-1].startswith(f"{URL}/run/checkpoints/{STEP_10} is passed over: its manifest")
    # Nothing of it is lost, by later checkpoints either.
    upload.upload(saved(run, 12)[0])
    assert upload.wait(60)
    names = {path.name for path in (run / "checkpoints" / STEP_10).iterdir()}
    assert copied(store, STEP_10).keys() == names - {"manifest.json"} | {
        "passed-over-manifest.json"
    }


def identity_of(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "progress.json").read_text())["identity"]


@pytest.mark.parametrize("damage", ["shorter", "flipped", "missing", "no manifest"])
def test_a_damaged_copy_is_not_used(
    run: Path, store: ObjectStore, tmp_path: Path, damage: str
) -> None:
    upload, _ = uploader(run)
    for name in (STEP_5, STEP_10):
        upload.upload(run / "checkpoints" / name)
        assert upload.wait(60)
    shard = next(name for name in copied(store, STEP_10) if name.startswith("shard"))
    path = f"/bucket/runs/run/checkpoints/{STEP_10}/{shard}"
    data = store.store[path].getvalue()
    match damage:
        case "shorter":
            store.pipe_file(path, data[:-1])
        case "flipped":
            store.pipe_file(path, data[:-1] + bytes([data[-1] ^ 1]))
        case "missing":
            store.rm_file(path)
        case _:
            store.rm_file(path.replace(shard, "manifest.json"))
    identity, reports = identity_of(run / "checkpoints" / STEP_5), list[str]()
    folder = tmp_path / "fresh"
    assert all(fetch_newest(f"{URL}/run", folder, identity, reports.append))
    assert [path.name for path in folder.iterdir()] == [STEP_5]
    assert find_damage(folder / STEP_5) is None
    assert len(reports) == (1 if damage == "no manifest" else 2)
    assert damage == "no manifest" or shard in reports[0]


def test_a_copy_of_another_run_is_refused(
    workspace: Workspace,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    upload, _ = uploader(run)
    upload.upload(run / "checkpoints" / STEP_10)
    assert upload.wait(60)
    with pytest.raises(SystemExit) as stop:
        train(workspace.recipe, "--run-dir", tmp_path / "x/run", *UPLOAD, "--training.seed", 5)
    assert stop.value.code == 2
    sentence = f"{URL}/run/checkpoints/{STEP_10} was trained with training.seed = 1337, not 5; keep"
    assert f"error: {sentence} that value to resume it, or choose" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_training_goes_on_without_its_copies(
    workspace: Workspace,
    trained_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def down(kind: str, path: str) -> None:
        if kind == "put" and "checkpoints" in path:
            raise ConnectionResetError(104, "Connection reset by peer")

    ObjectStore.on_request = down
    train(workspace.recipe, "--run-dir", tmp_path / "run", *UPLOAD)
    printed = capsys.readouterr().out
    assert f"{STEP_5} could not be uploaded: cannot write {URL}/run/checkpoints" in printed
    assert f"{STEP_10} could not be uploaded" in printed
    assert "; resume the run, or copy the checkpoint yourself." in printed
    assert losses(tmp_path / "run") == losses(trained_run)


@pytest.mark.parametrize(
    ("upload", "problem"),
    [
        (URL, f"cannot write {URL}/run/config.toml: permission denied (PermissionError: Denied)"),
        ("runs", "checkpoint.upload = 'runs' is not a URL; give one such as s3://bucket/runs"),
        ("foo://runs", "fsspec knows no scheme foo://"),
        (f"file://{__file__}", "config.toml: Not a directory"),
        (
            "file:///proc/nothing",
            "; set checkpoint.upload to a folder or bucket where you may write",
        ),
    ],
)
def test_mistakes_are_told_before_the_training(
    workspace: Workspace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    upload: str,
    problem: str,
) -> None:
    ObjectStore.on_request = fail(1, lambda: PermissionError("Denied"), "put")
    with pytest.raises(SystemExit) as stop:
        train(workspace.recipe, "--run-dir", tmp_path / "run", "--checkpoint.upload", upload)
    assert stop.value.code == 2
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "run/metrics.csv").exists()
