"""The folder of a run: whose it is, and what is no such folder."""

from pathlib import Path

import pytest

from fastllama.run_folder import RunFolder


@pytest.mark.parametrize("name", ["gone", "config.toml"])
def test_what_is_no_run_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.toml").touch()
    with pytest.raises(ValueError, match=f"{name} is not a run folder: it has no config.toml"):
        RunFolder(tmp_path / name).load_config()


def test_a_folder_in_which_something_was_kept_stays(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "runs" / "one")
    with run.locked():
        run.samples.touch()
    assert {path.name for path in run.path.iterdir()} == {".lock", "samples.jsonl"}


def test_a_folder_that_was_made_in_vain_goes_with_its_parents(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    for name in ("new/one", "kept/one"):
        with pytest.raises(KeyboardInterrupt), RunFolder(tmp_path / name).locked():
            raise KeyboardInterrupt
    assert [path.name for path in tmp_path.rglob("*")] == ["kept"]


def test_whoever_is_refused_leaves_the_folder_to_the_other(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "one")
    with run.locked():
        with pytest.raises(ValueError, match="another process"), run.locked():
            pass
        assert (run.path / ".lock").exists()
