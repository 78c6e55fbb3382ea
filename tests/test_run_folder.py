"""The folder of a run: its lock, and errors for other folders."""

from pathlib import Path

import pytest

from fastllama.run_folder import RunFolder


@pytest.mark.parametrize("name", ["gone", "config.toml"])
def test_error_for_another_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.toml").touch()
    with pytest.raises(ValueError, match=f"{name} is not a run folder: it has no config.toml"):
        RunFolder(tmp_path / name).load_config()


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
