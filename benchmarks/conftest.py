"""`pytest benchmarks --benchmark-only`: measures every operator and shows a table of ours."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.conditions import current_conditions
from benchmarks.operators.table import kernel_table
from benchmarks.results import KernelTime, append

ROWS: list[KernelTime] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--results", type=Path, help="folder to add the rows to, as JSON for benchmarks/report.py"
    )


@pytest.fixture
def rows(request: pytest.FixtureRequest) -> Iterator[list[KernelTime]]:
    """What a benchmark appends is shown at the end, and kept where --results says."""
    before = len(ROWS)
    yield ROWS
    folder = request.config.getoption("--results")
    if folder is not None:
        append(folder, current_conditions(), ROWS[before:])


def pytest_terminal_summary() -> None:
    if ROWS:
        console = Console()
        # Into a file or a pipe it would be cut at 80 columns.
        console.width = max(console.width, 150)
        console.print(kernel_table(ROWS, current_conditions()))
