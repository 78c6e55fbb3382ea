"""All records of a results folder and the conditions they share."""

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
REHEARSAL = "CPU rehearsal: tests the benchmark code, does not measure the speed of a GPU"


@dataclass(frozen=True)
class ResultSet:
    """All records of a folder with their conditions, in the order of measurement."""

    folder: Path
    ceilings: list[tuple[Conditions, Ceiling]]
    checks: list[tuple[Conditions, Check]]
    kernels: list[tuple[Conditions, KernelTime]]
    training: list[tuple[Conditions, TrainingRun]]
    profile: list[tuple[Conditions, ProfileShare]]
    tuning: list[tuple[Conditions, Tuning]]

    @classmethod
    def load(cls, folder: Path) -> "ResultSet":
        """Read all records of `folder`.

        Raises:
            ValueError: the folder holds no results, or a file is not a results file.
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
        """Conditions of every record, with repetitions."""
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
        """Distinct conditions regardless of date, oldest first."""
        by_date = sorted(self.measured_under, key=lambda conditions: conditions.date)
        return list(dict.fromkeys(undated(conditions) for conditions in by_date))

    @property
    def is_rehearsal(self) -> bool:
        """Whether any record is from a CPU; a single one would mislead."""
        return any(conditions.is_rehearsal for conditions in self.condition_sets)

    def mark(self, conditions: Conditions) -> str:
        """Letter of the conditions, such as ` [B]`; empty if all records share one set."""
        if len(self.condition_sets) == 1:
            return ""
        return f" [{set_letter(self.condition_sets.index(undated(conditions)))}]"


def undated(conditions: Conditions) -> Conditions:
    """Conditions without the date. Ratios are only valid between equal ones."""
    return dataclasses.replace(conditions, date="")


def set_letter(index: int) -> str:
    """A to Z, then A1, B1 and so on."""
    return chr(ord("A") + index % 26) + (str(index // 26) if index >= 26 else "")


def shape_text(shape: dict[str, int]) -> str:
    """Shape as text sorted by name: `M 4,096 · N 2,048`."""
    return " · ".join(f"{name} {size:,}" for name, size in sorted(shape.items()))
