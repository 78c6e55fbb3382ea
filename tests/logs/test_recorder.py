"""Rows of a run: what the recorder counts across a rewind."""

from pathlib import Path

import pytest

from fastllama.logs.rows import COLUMNS
from tests.runs import make_losses_nan, rows, train
from tests.workspace import Workspace


def test_session_counts_continue_after_a_rewind(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    make_losses_nan(monkeypatch, range(7, 10))
    train(workspace.recipe, "--run-dir", run, "--training.rewind-after", 3)
    # After update 9 the run rewinds to the checkpoint of update 5.
    logged = rows(run)
    assert [int(row["step"]) for row in logged] == list(range(1, 11))
    assert [int(row["tokens_total"]) for row in logged] == [256 * step for step in range(1, 11)]
    updates_of_session = [*range(1, 6), *range(10, 15)]
    assert [int(row["tokens"]) for row in logged] == [256 * n for n in updates_of_session]
    times = [float(row["time_s"]) for row in logged]
    superseded = (run / "superseded-metrics.csv").read_text().splitlines()
    column = COLUMNS.index("time_s")
    superseded_times = [float(line.split(",")[column]) for line in superseded]
    in_order = times[:5] + superseded_times + times[5:]
    assert in_order == sorted(in_order)
    assert all(float(row["tok_per_s"]) > 0 for row in logged)
