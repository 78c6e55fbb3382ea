"""The plot of a run."""

import math
from pathlib import Path

import pytest

from fastllama.logs.plot import plot_loss
from tests.logs.test_rows import row
from tests.logs.test_sinks import write_rows


@pytest.mark.parametrize("n_rows", [0, 1, 3])
def test_plot_is_a_png(tmp_path: Path, n_rows: int) -> None:
    write_rows(tmp_path, *(row(step, val_loss=2.5) for step in range(1, n_rows + 1)))
    plot_loss(tmp_path / "metrics.csv", tmp_path / "loss.png", title="run")
    assert is_png(tmp_path / "loss.png")


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.parametrize(
    "title", ["$A_$B", "$x^{$", "%s {} \\", "a\nb", "\x1b[2J", "日本語", "\udcff", "x" * 255, ""]
)
def test_title_is_plain_text(tmp_path: Path, title: str) -> None:
    write_rows(tmp_path, row(1))
    plot_loss(tmp_path / "metrics.csv", tmp_path / "loss.png", title)
    assert is_png(tmp_path / "loss.png")


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, 1e308])
def test_plot_of_extreme_losses(tmp_path: Path, loss: float) -> None:
    extreme = row(2)
    extreme.loss = loss
    write_rows(tmp_path, row(1), extreme, row(3))
    plot_loss(tmp_path / "metrics.csv", tmp_path / "loss.png", title="run")
    assert is_png(tmp_path / "loss.png")
