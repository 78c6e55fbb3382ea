"""Stored launch lists: what an update launches, by recipe and case, in TOML.

A case with options stores where it differs from the case without them; 0 is a launch that it does
not have.
"""

import tomllib
from collections import Counter
from pathlib import Path

FOLDER = Path(__file__).parent / "budgets"


def read_budget(recipe: str) -> dict[str, dict[str, int]]:
    """Launches by case; empty for a recipe without a file."""
    file = FOLDER / f"{recipe}.toml"
    stored = tomllib.loads(file.read_text()) if file.exists() else {}
    budget = {}
    for case, launches in stored.items():
        whole = stored.get(base_of(case), {}) | launches
        budget[case] = {name: count for name, count in whole.items() if count}
    return budget


def base_of(case: str) -> str:
    """The name of the same case without options: ranks, and eager or compiled."""
    return ", ".join(case.split(", ")[:2])


def write_budget(recipe: str, cases: dict[str, Counter[str]]) -> None:
    """Replace the launch lists of these cases."""
    budget: dict[str, dict[str, int]] = read_budget(recipe) | {**cases}
    lines = [
        f"# Launches of an update of {recipe}, by `make cuda-rehearsal UPDATE=1`.",
        "# A case with options has only what differs from the one without.",
    ]
    for case, launches in budget.items():
        base = budget.get(base_of(case), {}) if case != base_of(case) else {}
        names = launches.keys() | base.keys()
        changed = {name: launches.get(name, 0) for name in names}
        changed = {name: count for name, count in changed.items() if count != base.get(name, 0)}
        lines += ["", f'["{case}"]']
        ordered = sorted(changed.items(), key=lambda item: (-item[1], item[0]))
        lines += [f'"{name}" = {count}' for name, count in ordered]
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{recipe}.toml").write_text("\n".join(lines) + "\n")
