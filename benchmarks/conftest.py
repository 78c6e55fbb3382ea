"""Fixtures and summary table of `pytest benchmarks --benchmark-only`."""

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
        "--results",
        type=Path,
        help="append the rows to this folder, as JSON for benchmarks/report.py",
    )


@pytest.fixture
def rows(request: pytest.FixtureRequest) -> Iterator[list[KernelTime]]:
    """Rows of the summary table. New rows are also saved in the folder of --results."""
    before = len(ROWS)
    yield ROWS
    folder = request.config.getoption("--results")
    if folder is not None:
        append(folder, current_conditions(), ROWS[before:])


def pytest_terminal_summary() -> None:
    if ROWS:
        console = Console()
        # In a file or a pipe rich would cut the table at 80 columns.
        console.width = max(console.width, 150)
        console.print(kernel_table(ROWS, current_conditions()))
