"""A trained run with the checkpoints of updates 5 and 10."""

import shutil
from pathlib import Path

import pytest

from tests.runs import train
from tests.workspace import Workspace


@pytest.fixture(scope="package")
def trained_run(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, shared by all tests; do not change it."""
    run = tmp_path_factory.mktemp("runs") / "run"
    train(workspace.recipe, "--run-dir", run)
    return run


@pytest.fixture
def run(trained_run: Path, tmp_path: Path) -> Path:
    """A copy of `trained_run`, to damage and to resume."""
    shutil.copytree(trained_run, tmp_path / "run", symlinks=True)
    return tmp_path / "run"
