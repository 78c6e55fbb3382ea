"""Stored launch lists: what an update launches, by recipe and case, in TOML."""

import tomllib
from collections import Counter
from pathlib import Path

FOLDER = Path(__file__).parent / "budgets"


def read_budget(recipe: str) -> dict[str, dict[str, int]]:
    """Launches by case; empty for a recipe without a file."""
    file = FOLDER / f"{recipe}.toml"
    return tomllib.loads(file.read_text()) if file.exists() else {}


def write_budget(recipe: str, cases: dict[str, Counter[str]]) -> None:
    """Replace the launch lists of these cases."""
    budget = read_budget(recipe) | cases
    lines = [f"# Launches of an update of {recipe}, by `make cuda-rehearsal UPDATE=1`."]
    for case, launches in budget.items():
        lines += ["", f'["{case}"]']
        ordered = sorted(launches.items(), key=lambda item: (-item[1], item[0]))
        lines += [f'"{name}" = {count}' for name, count in ordered]
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{recipe}.toml").write_text("\n".join(lines) + "\n")
