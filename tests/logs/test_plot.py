"""The plot of a run."""

from pathlib import Path

import pytest

from fastllama.logs.plot import plot_loss
from tests.logs.test_rows import row
from tests.logs.test_sinks import write_rows


@pytest.mark.parametrize("n_rows", [0, 1, 3])
def test_plot_is_a_png(tmp_path: Path, n_rows: int) -> None:
    write_rows(tmp_path, *(row(step, val_loss=2.5) for step in range(1, n_rows + 1)))
    plot_loss(tmp_path / "metrics.csv", tmp_path / "loss.png", title="run")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG\r\n")
