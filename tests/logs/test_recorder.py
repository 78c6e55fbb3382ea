"""Rows of a run: what the recorder counts across a rewind."""

import math
from pathlib import Path

import pytest

from fastllama.logs.recorder import SourceLosses, perplexity
from fastllama.logs.results import SourceResult, UpdateResult
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


def test_perplexity_of_any_loss() -> None:
    assert perplexity(2.0) == math.exp(2.0)
    assert perplexity(1e4) == perplexity(math.inf) == math.inf
    assert math.isnan(perplexity(math.nan))


def test_losses_of_sources_between_rows() -> None:
    def result(*sources: SourceResult) -> UpdateResult:
        return UpdateResult(1, 8, 2.0, 1.0, "", False, 1.0, 0.0, [0.0], list(sources))

    losses = SourceLosses(["a", "b"])
    losses.observe(result(SourceResult(2.0, 64, 64), SourceResult(math.nan, 0, 0)))
    losses.observe(result(SourceResult(5.0, 32, 96), SourceResult(math.nan, 32, 32)))
    # A skipped update with a NaN does not take the mean of the others.
    assert losses.take() == {"loss/a": 3.0, "tokens/a": 96, "tokens/b": 32}
    losses.observe(result(SourceResult(math.nan, 0, 96), SourceResult(1.5, 64, 96)))
    assert losses.take() == {"tokens/a": 96, "loss/b": 1.5, "tokens/b": 96}
