"""Parts of a preparation, each for one process: which files a part has, and its folder.

A part has a run of consecutive files, so the parts' token streams, one after another, are the
stream of a single process.
"""

import os
import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict

from fastllama.printable import shortened

MAX_PARTS = 99_999
"""The largest number that the names of the folders hold."""
PART_FOLDER = "part-([0-9]{5})-of-([0-9]{5})"
"""Pattern of the names of the parts' folders."""


@dataclass(frozen=True)
class Part:
    """Part `number`, from 1, of `count`.

    Raises:
        ValueError: there is no such part.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    number: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            n = self.count or "N"
            raise ValueError(f"part {self} does not exist: the parts are 1/{n} to {n}/{n}")
        if self.count > MAX_PARTS:
            raise ValueError(f"part {self} is one of more than {MAX_PARTS:,}: choose fewer parts")

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Read "2/16".

        Raises:
            ValueError: the text has another form, or there is no such part.
        """
        if not (match := re.fullmatch("([0-9]{1,9})/([0-9]{1,9})", text)):
            raise ValueError(
                f"part {shortened(repr(text), 40)} is not of the form I/N, such as 2/16"
            )
        return cls(int(match[1]), int(match[2]))

    @property
    def folder(self) -> str:
        """Name of the folder, below the folder of all parts."""
        return f"part-{self.number:05d}-of-{self.count:05d}"

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


def files_of_part(sizes: Sequence[int], part: Part) -> slice:
    """The places of the files of `part` among all files, which have these sizes in bytes.

    A file belongs to the part in which the middle of its bytes lies, if all bytes are divided
    equally. So a part has at most the bytes of one file more than its equal share.
    """
    total, before = sum(sizes), 0
    owners = []
    for size in sizes:
        owner = (2 * before + size) * part.count // max(1, 2 * total)
        owners.append(min(owner, part.count - 1))  # An empty file at the end lies beyond them all.
        before += size
    return slice(bisect_left(owners, part.number - 1), bisect_right(owners, part.number - 1))


def parts_in(folder: Path) -> list[Part]:
    """The parts that have a folder below `folder`, in order."""
    # Unlike `Path.iterdir`, `scandir` knows what is a folder without asking the disk for each.
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir())
    found = []
    for name in names:
        if match := re.fullmatch(PART_FOLDER, name):
            with suppress(ValueError):  # Such as part 5 of 4.
                found.append(Part(int(match[1]), int(match[2])))
    return found


def part_of_array(environment: Mapping[str, str]) -> Part | None:
    """The part of a task in a SLURM array: 3/16 in the third of 16 tasks. None without an array.

    An array of one task has no parts.

    Raises:
        ValueError: the numbers of the tasks have gaps, or are no numbers.
    """
    if environment.get("SLURM_ARRAY_TASK_COUNT", "1") == "1":
        return None
    numbers = []
    for name in ("ID", "MIN", "MAX", "COUNT", "STEP"):
        variable = f"SLURM_ARRAY_TASK_{name}"
        value = environment.get(variable, "1")
        if not (value.isascii() and value.isdecimal()):
            raise ValueError(
                f"{variable} = {value!r} is no number: unset the SLURM variables, or give --part"
            )
        numbers.append(int(value))
    task, first, last, count, step = numbers
    number, beside = divmod(task - first, step)
    if beside or (last - first) // step + 1 != count:
        raise ValueError(
            f"the SLURM array has {count} tasks with numbers from {first} to {last}, which leave "
            f"open which part task {task} is: submit the whole array, or give --part"
        )
    return Part(number + 1, count)
