"""A folder of results read whole, and what its records have in common."""

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from benchmarks.results import (
    FILES,
    Ceiling,
    Check,
    Conditions,
    KernelTime,
    ProfileShare,
    TrainingRun,
    Tuning,
    read,
)

OURS = "fastllama"
REHEARSAL = "CPU rehearsal: shows that the measuring works; says nothing of speed on a GPU"


@dataclass(frozen=True)
class ResultSet:
    """All records of a folder, each with its conditions, in the order they were measured."""

    folder: Path
    ceilings: list[tuple[Conditions, Ceiling]]
    checks: list[tuple[Conditions, Check]]
    kernels: list[tuple[Conditions, KernelTime]]
    training: list[tuple[Conditions, TrainingRun]]
    profile: list[tuple[Conditions, ProfileShare]]
    tuning: list[tuple[Conditions, Tuning]]

    @classmethod
    def load(cls, folder: Path) -> "ResultSet":
        """Read `folder`.

        Raises:
            ValueError: it holds no results, or a file that is not one of results.
        """
        results = cls(
            folder,
            ceilings=list(read(folder, Ceiling)),
            checks=list(read(folder, Check)),
            kernels=list(read(folder, KernelTime)),
            training=list(read(folder, TrainingRun)),
            profile=list(read(folder, ProfileShare)),
            tuning=list(read(folder, Tuning)),
        )
        if not results.measured_under:
            raise ValueError(
                f"{folder} holds no results; give a folder with any of {', '.join(FILES.values())}."
            )
        return results

    @cached_property
    def measured_under(self) -> list[Conditions]:
        """Conditions of every record."""
        kinds = (
            self.ceilings,
            self.checks,
            self.kernels,
            self.training,
            self.profile,
            self.tuning,
        )
        return [conditions for records in kinds for conditions, _ in records]

    @cached_property
    def condition_sets(self) -> list[Conditions]:
        """The distinct conditions, dates aside, oldest first."""
        by_date = sorted(self.measured_under, key=lambda conditions: conditions.date)
        return list(dict.fromkeys(undated(conditions) for conditions in by_date))

    @property
    def is_rehearsal(self) -> bool:
        """Whether any record is from a CPU: one is enough to mislead."""
        return any(conditions.is_rehearsal for conditions in self.condition_sets)

    def mark(self, conditions: Conditions) -> str:
        """` [B]` where records were measured under different conditions; empty where not."""
        if len(self.condition_sets) == 1:
            return ""
        return f" [{set_letter(self.condition_sets.index(undated(conditions)))}]"


def undated(conditions: Conditions) -> Conditions:
    """What has to be equal for two numbers to be put into one ratio."""
    return dataclasses.replace(conditions, date="")


def set_letter(index: int) -> str:
    """A to Z, then A1 and on."""
    return chr(ord("A") + index % 26) + (str(index // 26) if index >= 26 else "")


def shape_text(shape: dict[str, int]) -> str:
    """`M 4,096 · N 2,048`, in one order whatever the order they were given in."""
    return " · ".join(f"{name} {size:,}" for name, size in sorted(shape.items()))
