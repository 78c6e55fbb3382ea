"""The plot of a run: loss, validation loss and learning rate over tokens."""

import io
import warnings
from pathlib import Path

from fastllama.atomic import write_atomic
from fastllama.logs.rows import VALIDATION, read_rows
from fastllama.printable import one_line

MAX_TITLE = 100
"""Characters of a title; more do not fit the figure."""


def plot_loss(metrics_csv: Path, output: Path, title: str) -> None:
    """Draw loss, validation loss and learning rate over tokens as a PNG.

    Raises:
        Exception: whatever Matplotlib raises, also on import.
    """
    # Imported here so that a faulty installation costs the plot, not the run.
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    rows = [row for row in read_rows(metrics_csv) if row.keys() >= {"tokens_total", "loss", "lr"}]
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["tokens_total"] for row in rows], [row["loss"] for row in rows], label="loss")
    names = sorted({name for row in rows for name in row if name.startswith(VALIDATION)})
    for name in [*names, "val_loss"]:
        validated = [row for row in rows if name in row]
        if name == "val_loss":  # Of sessions with one validation set.
            validated = [row for row in validated if not row.keys() & set(names)]
        if validated:
            axes.plot(
                [row["tokens_total"] for row in validated],
                [row[name] for row in validated],
                "o-",
                label=f"validation loss {name.partition('/')[2]}".rstrip(),
            )
    axes.set(xlabel="tokens", ylabel="loss (nats per token)")
    # Two dollar signs in the name of a run are no formula, whatever the user's matplotlibrc says.
    axes.set_title(one_line(title, MAX_TITLE), parse_math=False, usetex=False)
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
    with warnings.catch_warnings():
        # Of characters in a name that the font lacks, and of extreme losses. Neither needs action.
        warnings.simplefilter("ignore")
        figure.savefig(buffer, format="png", dpi=120)
    write_atomic(output, buffer.getvalue())
