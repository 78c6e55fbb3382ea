"""The plot of a run: loss, validation loss and learning rate over tokens."""

import io
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from fastllama.atomic import write_atomic
from fastllama.logs.rows import read_rows


def plot_loss(metrics_csv: Path, output: Path, title: str) -> None:
    """Draw loss, validation loss and learning rate over tokens as a PNG."""
    rows = read_rows(metrics_csv)
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["tokens_total"] for row in rows], [row["loss"] for row in rows], label="loss")
    validated = [row for row in rows if "val_loss" in row]
    if validated:
        axes.plot(
            [row["tokens_total"] for row in validated],
            [row["val_loss"] for row in validated],
            "o-",
            label="validation loss",
        )
    axes.set(xlabel="tokens", ylabel="loss (nats per token)", title=title)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    rate = axes.twinx()
    rate.plot(
        [row["tokens_total"] for row in rows],
        [row["lr"] for row in rows],
        color="gray",
        linestyle=":",
        label="learning rate",
    )
    rate.set_ylabel("learning rate")
    rate.set_ylim(bottom=0)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    lines = axes.get_lines() + rate.get_lines()
    axes.legend(lines, [str(line.get_label()) for line in lines], loc="upper right")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomic(output, buffer.getvalue())
