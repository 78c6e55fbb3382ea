"""The plot of `data stats`: document lengths, and how often each token occurs."""

import io
from pathlib import Path

import numpy as np

from fastllama.atomic import write_atomic
from fastllama.data.statistics import TokenCounts

BINS_PER_OCTAVE = 4


def check_plot(path: Path) -> None:
    """Check the name of a plot before the data is read.

    Raises:
        ValueError: `path` is no .png file, or its folder does not exist.
    """
    if path.suffix.lower() != ".png" or path.is_dir():
        raise ValueError(f"plot {path} is not a .png file: name one, such as --plot stats.png")
    if not path.parent.is_dir():
        raise ValueError(f"the folder of the plot {path} does not exist: make it first")


def plot_counts(counts: dict[str, TokenCounts], output: Path) -> None:
    """Draw the lengths of documents and the counts of tokens of each split as a PNG."""
    # Takes a second, which the command without --plot should not.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    of_lengths, of_tokens = figure.subplots(1, 2)
    for name, counted in counts.items():
        lengths = np.array(list(counted.lengths), np.int64)
        documents = np.array(list(counted.lengths.values()), np.int64)
        octaves = np.log2(counted.longest + 1)
        edges = 2.0 ** np.arange(0, octaves + 1, 1 / BINS_PER_OCTAVE)
        shares = documents / max(1, documents.sum())
        of_lengths.hist(lengths, bins=edges, weights=shares, histtype="step", label=name)
        frequencies = np.sort(counted.ids[counted.ids > 0])[::-1] / counted.tokens
        of_tokens.plot(np.arange(1, frequencies.size + 1), frequencies, label=name)
    of_lengths.set(xscale="log", xlabel="document length (tokens)", ylabel="share of documents")
    of_tokens.set(xscale="log", yscale="log", xlabel="rank of the token", ylabel="share of tokens")
    for axes in (of_lengths, of_tokens):
        axes.grid(alpha=0.3)
        axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomic(output, buffer.getvalue())
