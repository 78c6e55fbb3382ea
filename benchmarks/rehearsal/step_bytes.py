"""What an update of each recipe moves and computes, next to the bound H, as a Markdown table.

    python -m benchmarks.rehearsal.step_bytes [RECIPE ...]

Counted on the null device, for a whole compiled update on one device, or on eight where one is
too small. Cells are GB moved / GB of the bound, and the time of the difference as a share of H's.
No time is measured: the share is arithmetic with the rates of an H100.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.rehearsal.build import build
from benchmarks.rehearsal.case import RECIPES, Case
from benchmarks.rehearsal.checks import flops
from benchmarks.rehearsal.kernels import moved_bytes
from benchmarks.rehearsal.processes import rehearse
from fastllama.config import config_from_dict
from fastllama.planning.bound import ADAMW_BYTES, DEVICE_RATES, bound, min_bytes
from fastllama.planning.flops import n_parameters

RATES = DEVICE_RATES["H100"]
OTHER_LIMITS = ("matmul", "attention", "collectives")
"""Classes that bytes of device memory do not bound: FLOPs do, or another link."""


@dataclass(frozen=True)
class Column:
    """One recipe's column."""

    title: str
    tokens: float
    """Of a device and update."""
    matmul_flops: int
    cells: dict[str, str]
    """By class, the most bytes first."""


def column(recipe: str, libraries: Path, folder: Path) -> Column:
    """Count an update of a recipe.

    Raises:
        RuntimeError: the rehearsal fails.
    """
    ranks = 8 if recipe == "llama-3.1-8b" else 1
    case = Case(recipe, ranks, compiled=True, whole_update=True)
    _, measured, calls, failure = rehearse(case, libraries=libraries, folder=folder)
    if measured is None:
        raise RuntimeError(failure)
    config = config_from_dict(measured.config, source="the log")
    tokens = config.training.tokens_per_update / ranks
    least = {name: n_bytes * tokens for name, n_bytes in min_bytes(config.model).items()}
    least["optimizer"] = ADAMW_BYTES * n_parameters(config.model) / ranks
    seconds = bound(config.model, round(tokens), RATES).seconds_per_token * tokens
    cells = {}
    for name, n_bytes in moved_bytes(calls, config, ranks).most_common():
        cells[name] = f"{n_bytes / 1e9:,.1f}"
        if name not in OTHER_LIMITS:
            beyond = n_bytes - least.get(name, 0)
            share = beyond / RATES.bandwidth / seconds
            cells[name] += f" / {least.get(name, 0) / 1e9:,.1f}, {share:.2%}"
    matmul_flops = sum(flops(call) for call in calls if call.kind == "matmul")
    return Column(f"{recipe}, {ranks} x", tokens, matmul_flops, cells)


def markdown(columns: Sequence[Column]) -> str:
    """All columns, with a row for each class."""
    rows = [
        ["", *(column.title for column in columns)],
        ["---", *("---:" for _ in columns)],
        ["tokens", *(f"{column.tokens:,.0f}" for column in columns)],
        ["TFLOP in matmuls", *(f"{column.matmul_flops / 1e12:,.0f}" for column in columns)],
    ]
    names = dict.fromkeys(name for column in columns for name in column.cells)
    rows += [[name, *(column.cells.get(name, "") for column in columns)] for name in names]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", default=RECIPES, help="recipes to count")
    parser.add_argument(
        "--libraries", type=Path, default=Path(".venv-cuda/null-cuda"), help="where to build"
    )
    options = parser.parse_args()
    libraries = options.libraries.resolve()
    build(libraries)
    with tempfile.TemporaryDirectory() as folder:
        columns = [column(recipe, libraries, Path(folder)) for recipe in options.recipes]
    print(markdown(columns))


if __name__ == "__main__":
    main()
