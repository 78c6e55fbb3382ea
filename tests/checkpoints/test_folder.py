"""The folder of checkpoints: its files, its link, and which checkpoints are kept."""

from pathlib import Path

from fastllama.checkpoints.folder import remove_old
from fastllama.checkpoints.reading import find_damage
from fastllama.config import CheckpointConfig, Config, TrainingConfig
from tests.runs import train
from tests.workspace import Workspace


def test_files_of_a_checkpoint(run: Path) -> None:
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["latest", "step-00000005", "step-00000010"]
    files = sorted(path.name for path in (run / "checkpoints" / "latest").iterdir())
    assert files[:2] == ["manifest.json", "progress.json"]
    assert [Path(name).suffix for name in files[2:]] == [".safetensors"]


def test_stale_latest_link_is_repaired(workspace: Workspace, run: Path) -> None:
    latest = run / "checkpoints" / "latest"
    latest.unlink()
    # The state after a kill between the last checkpoint's rename and its link.
    latest.symlink_to("step-00000005")
    train(workspace.recipe, "--run-dir", run)
    assert latest.resolve().name == "step-00000010"


def keep(last: int, every_tokens: int = 0) -> Config:
    """A run of 256 tokens per update, with these options for what to keep."""
    return Config(
        training=TrainingConfig(tokens_per_update=256),
        checkpoint=CheckpointConfig(keep_last=last, keep_every_tokens=every_tokens),
    )


def test_keep_last(run: Path) -> None:
    checkpoints = run / "checkpoints"
    remove_old(checkpoints / "step-00000010", keep(last=1))
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step-00000010"]
    assert find_damage(checkpoints / "latest") is None


def test_keep_every_tokens(tmp_path: Path) -> None:
    kept = set()
    for step in range(3, 31, 3):
        (tmp_path / f"step-{step:08d}").mkdir()
        # The multiples are updates 8, 16 and 24; the first checkpoints at or after them are those
        # of updates 9, 18 and 24.
        remove_old(tmp_path / f"step-{step:08d}", keep(last=2, every_tokens=8 * 256))
        kept = {int(path.name.removeprefix("step-")) for path in tmp_path.iterdir()}
        assert {9, 18, 24, step, step - 3} & set(range(3, step + 1)) == kept
    assert kept == {9, 18, 24, 27, 30}


def test_other_folders_stay(run: Path) -> None:
    checkpoints = run / "checkpoints"
    for name in ("step-final", "step-1", "checkpoint-20", "step-00000004.bak"):
        (checkpoints / name).mkdir()
    remove_old(checkpoints / "step-00000010", keep(last=1))
    names = sorted(path.name for path in checkpoints.iterdir())
    assert names == [
        "checkpoint-20",
        "latest",
        "step-00000004.bak",
        "step-00000010",
        "step-1",
        "step-final",
    ]
