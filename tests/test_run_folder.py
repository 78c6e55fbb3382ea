"""The folder of a run: its lock, and errors for other folders."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from fastllama import atomic
from fastllama.config import Config, TrainingConfig
from fastllama.run_folder import RunFolder
from tests.workspace import Workspace


@pytest.fixture(autouse=True)
def nothing_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what this process has reported."""
    monkeypatch.setattr(atomic, "_reported", set())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gone", "it does not exist"),
        ("some/folder", "it does not exist"),
        ("config.toml", "it is inside of one; give .*"),
        ("checkpoints", "it is inside of one; give .*"),
    ],
)
def test_error_for_another_folder(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "config.toml").touch()
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match=f"{name} is not a run folder: {reason}"):
        RunFolder(tmp_path / name).load_config()


def test_data_folder_is_no_run_folder(workspace: Workspace) -> None:
    before = sorted(workspace.data.iterdir())
    with (
        pytest.raises(ValueError, match=r"data is a data folder; choose another --run-dir"),
        RunFolder(workspace.data).locked(),
    ):
        pass
    assert sorted(workspace.data.iterdir()) == before


def test_folder_with_a_file_stays(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "runs" / "one")
    with run.locked():
        run.samples.touch()
    assert {path.name for path in run.path.iterdir()} == {".lock", "samples.jsonl"}


def test_empty_folder_is_removed_with_created_parents(tmp_path: Path) -> None:
    (tmp_path / "existing").mkdir()
    for name in ("new/one", "existing/one"):
        with pytest.raises(KeyboardInterrupt), RunFolder(tmp_path / name).locked():
            raise KeyboardInterrupt
    assert [path.name for path in tmp_path.rglob("*")] == ["existing"]


def test_failed_second_lock_keeps_the_folder(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "one")
    with run.locked():
        with pytest.raises(ValueError, match="another process"), run.locked():
            pass
        assert (run.path / ".lock").exists()


def test_checkpoint_given_as_a_run(tmp_path: Path) -> None:
    (tmp_path / "config.toml").touch()
    checkpoint = tmp_path / "checkpoints" / "step-00000004"
    with pytest.raises(ValueError, match=f"is a checkpoint; give its run folder {tmp_path}"):
        RunFolder(checkpoint).load_config()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[model]\nn_heads = 0", "model.n_heads must be at least 1, not 0"),
        (b"[training]\neval_interval = 1" + 400 * b"0", "training.eval_interval must be at most"),
        (b"[training]\neval_interval = 1" + 5000 * b"0", "cannot be read as TOML"),
        (b"# \xff", "is not UTF-8 text: byte 2 is 0xff"),
        (b"[model]\nx = 1", "unknown option model.x"),
    ],
)
def test_damaged_configuration_is_named(tmp_path: Path, text: bytes, message: str) -> None:
    run = RunFolder(tmp_path)
    run.config.write_bytes(text)
    with pytest.raises(ValueError, match=f"^{run.config}.*{message}"):
        run.load_config()


def started(path: Path) -> RunFolder:
    """A run folder after a start that failed before the first checkpoint."""
    run = RunFolder(path)
    (path / "tokenizer").touch()
    run.create(Config(), path / "tokenizer")
    return run


def test_path_inside_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match=f"^{path} is not a folder.*choose another --run-dir"):
            RunFolder(path).locked().__enter__()


@pytest.mark.parametrize("name", ["config.toml", "tokenizer.json"])
def test_folder_named_like_a_file_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=f"{name} is a folder; move it away."):
        RunFolder(tmp_path).create(Config(), tmp_path / "tokenizer")
    assert {path.name for path in tmp_path.iterdir()} == {name}


def test_pipe_is_no_configuration(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.toml")
    with pytest.raises(ValueError, match="is not a run folder"):
        RunFolder(tmp_path).load_config()


def test_failed_start_may_be_corrected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = started(tmp_path)
    before = run.config.read_bytes()
    corrected = Config(training=TrainingConfig(batch_size=1))
    run.refuse_other_options(corrected)
    run.create(corrected, run.tokenizer)
    assert run.load_config() == corrected
    assert (tmp_path / "passed-over-config.toml-1").read_bytes() == before
    assert "its options are kept as passed-over-config.toml-1" in capsys.readouterr().err
    # The same options again leave nothing behind.
    run.create(corrected, run.tokenizer)
    assert not (tmp_path / "passed-over-config.toml-2").exists()


@pytest.mark.parametrize("name", ["step-00000004", "passed-over-step-00000004-1"])
def test_run_with_a_checkpoint_keeps_its_options(tmp_path: Path, name: str) -> None:
    run = started(tmp_path)
    (run.checkpoints / name).mkdir()
    with pytest.raises(ValueError, match=r"training.batch_size = 4, not 1; choose another"):
        run.refuse_other_options(Config(training=TrainingConfig(batch_size=1)))


def test_checkpoints_on_a_missing_disk_are_named(tmp_path: Path) -> None:
    run = started(tmp_path)
    before = run.config.read_bytes()
    run.checkpoints.rmdir()
    run.checkpoints.symlink_to("/nowhere/checkpoints")
    with pytest.raises(ValueError, match=f"^{run.checkpoints} is not a folder.*mount the disk"):
        run.create(Config(training=TrainingConfig(batch_size=1)), run.tokenizer)
    assert run.config.read_bytes() == before


DAMAGED = {
    "empty": b"",
    "cut": b'[\n  {\n    "started": "2026-0',
    "no list": b"{}",
    "no text": b"\xff\xfe",
    "nested": 100_000 * b"[",
}


@pytest.mark.parametrize("name", [*DAMAGED, "folder", "pipe", "link to itself"])
def test_damaged_environment_is_set_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    run = started(tmp_path)
    path = tmp_path / "environment.json"
    path.unlink()
    if name == "folder":
        path.mkdir()
    elif name == "pipe":
        os.mkfifo(path)
    elif name == "link to itself":
        path.symlink_to(path.name)
    else:
        path.write_bytes(DAMAGED[name])
    run.create(Config(), run.tokenizer)
    assert len(json.loads(path.read_bytes())) == 1
    assert os.path.lexists(tmp_path / "passed-over-environment.json-1")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Not used: ")
    assert str(path) in line
    assert line.endswith("It is kept as passed-over-environment.json-1.")


def test_environment_keeps_all_sessions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The second argument is a file name that is not UTF-8.
    monkeypatch.setattr(sys, "argv", ["fastllama", "caf\udce9.toml"])
    run = started(tmp_path)
    run.create(Config(), run.tokenizer)
    sessions = json.loads((tmp_path / "environment.json").read_bytes())
    assert [session["command"][1:] for session in sessions] == [["fastllama", "caf\\xe9.toml"]] * 2
    assert capsys.readouterr().err == ""


AUTO = {"training.dtype": "bfloat16", "training.compile": True}


@pytest.mark.parametrize(
    ("now", "reported"),
    [
        (AUTO, []),
        ({"training.compile": True}, []),
        (
            {"training.dtype": "float32", "training.compile": False},
            [
                'training.compile = "auto" is false here and was true before, so the numbers will '
                "differ slightly; --training.compile true keeps it.",
                'training.dtype = "auto" is float32 here and was bfloat16 before, so the numbers '
                "will differ slightly; --training.dtype bfloat16 keeps it.",
            ],
        ),
    ],
    ids=["same", "given", "other"],
)
@pytest.mark.parametrize("saved", [True, False])
def test_other_choices_of_auto_are_reported(
    now: dict[str, Any],
    reported: list[str],
    saved: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = started(tmp_path)
    if saved:
        (run.checkpoints / "step-00000001").mkdir()
    run.create(Config(), run.tokenizer, chosen=AUTO)
    run.create(Config(), run.tokenizer, chosen=now)
    lines = [f"{tmp_path}: {sentence}" for sentence in reported] if saved else []
    assert capsys.readouterr().err.splitlines() == lines
    # A session of an older version has recorded no choices.
    run.create(Config(), run.tokenizer)
    run.create(Config(), run.tokenizer, chosen=now)
    assert capsys.readouterr().err == ""
