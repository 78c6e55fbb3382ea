"""Formatting of numbers and Markdown tables in a report."""

from collections.abc import Iterable, Sequence

from benchmarks.reporting.comparison import combined
from benchmarks.results import Spread


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], n_text: int) -> str:
    """Markdown table. The first `n_text` columns are left-aligned, the others right-aligned."""
    alignment = [":--"] * n_text + ["--:"] * (len(headings) - n_text)
    lines = [headings, alignment, *([one_line(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def one_line(text: str) -> str:
    """Foreign text, such as an error message, on one line and escaped for a table or list."""
    return " ".join(text.split()).replace("|", "\\|")


def number(value: float) -> str:
    """Three significant digits; numbers above 100 keep all their integer digits."""
    if abs(value) >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.3g}"


def ratio(seconds: Spread, ours: Sequence[Spread]) -> str:
    """Time over our time; empty without a time of ours."""
    return f"{seconds.median / combined(ours).median:.2f}" if ours else ""


def plus_minus(spread: Spread) -> str:
    """Half the interquartile range, as a suffix for a median."""
    return f" ± {spread.noise / 2:.1%}"
