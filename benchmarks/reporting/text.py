"""Numbers, shapes and tables of a report as text."""

from collections.abc import Iterable, Sequence

from benchmarks.reporting.comparison import combined
from benchmarks.results import Spread


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], n_text: int) -> str:
    """A Markdown table whose first `n_text` columns are aligned left, the others right."""
    alignment = [":--"] * n_text + ["--:"] * (len(headings) - n_text)
    lines = [headings, alignment, *([one_line(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def one_line(text: str) -> str:
    """What others wrote, such as an error message, inside a table or list."""
    return " ".join(text.split()).replace("|", "\\|")


def number(value: float) -> str:
    """Three digits that mean something, more only before the point."""
    if abs(value) >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.3g}"


def ratio(seconds: Spread, ours: Sequence[Spread]) -> str:
    """Time over ours; empty where there is none to compare with."""
    return f"{seconds.median / combined(ours).median:.2f}" if ours else ""


def plus_minus(spread: Spread) -> str:
    """Half the width of the middle half, to stand behind a median."""
    return f" ± {spread.noise / 2:.1%}"
