"""Which files a part has, and which part a task of a SLURM array is."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastllama.data.parts import Part, files_of_part, part_of_array, parts_in

ARRAY = {"MIN": "1", "MAX": "16", "COUNT": "16", "STEP": "1"}


@given(st.lists(st.integers(0, 100) | st.integers(0, 10**15), max_size=40), st.integers(1, 60))
def test_parts_are_runs_of_equal_size(sizes: list[int], count: int) -> None:
    runs = [files_of_part(sizes, Part(number, count)) for number in range(1, count + 1)]
    files = list(range(len(sizes)))
    assert [file for run in runs for file in files[run]] == files
    for run in runs:
        assert sum(sizes[run]) <= sum(sizes) / count + max(sizes, default=0)


@pytest.mark.parametrize(
    ("sizes", "count", "runs"),
    [
        ([5, 5, 5, 5], 4, [[5], [5], [5], [5]]),
        ([5, 5, 5, 5], 2, [[5, 5], [5, 5]]),
        ([9, 1, 1, 9], 2, [[9, 1], [1, 9]]),
        ([1, 2, 3], 1, [[1, 2, 3]]),
        ([8, 8], 4, [[], [8], [], [8]]),
        ([0, 0], 2, [[0, 0], []]),
        ([4, 4, 0], 2, [[4], [4, 0]]),
        ([], 2, [[], []]),
    ],
)
def test_dealt_files(sizes: list[int], count: int, runs: list[list[int]]) -> None:
    dealt = [sizes[files_of_part(sizes, Part(number, count))] for number in range(1, count + 1)]
    assert dealt == runs


@pytest.mark.parametrize("text", ["1/1", "2/16", "99999/99999"])
def test_part_as_text(text: str, tmp_path: Path) -> None:
    part = Part.parse(text)
    assert str(part) == text
    (tmp_path / part.folder).mkdir()
    assert parts_in(tmp_path) == [part]


def test_names_that_are_no_folders_of_parts(tmp_path: Path) -> None:
    for name in ("part-00005-of-00004", "part-00000-of-00004", "part-1-of-4", "part-00001-of-4"):
        (tmp_path / name).mkdir()
    (tmp_path / "part-00001-of-00004").touch()
    assert parts_in(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"ID": "1"}, Part(1, 16)),
        ({"ID": "16"}, Part(16, 16)),
        ({"ID": "0", "MIN": "0", "MAX": "7", "COUNT": "8"}, Part(1, 8)),
        ({"ID": "14", "MIN": "10", "MAX": "15", "COUNT": "3", "STEP": "2"}, Part(3, 3)),
        ({"ID": "7", "MIN": "7", "MAX": "7", "COUNT": "1"}, None),
    ],
)
def test_task_of_an_array(changes: dict[str, str], part: Part | None) -> None:
    values = ARRAY | changes
    assert part_of_array({f"SLURM_ARRAY_TASK_{name}": values[name] for name in values}) == part


def test_no_array() -> None:
    assert part_of_array({"SLURM_JOB_ID": "5"}) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"ID": "7", "MIN": "3", "MAX": "7", "COUNT": "2"},
        {"ID": "4", "MIN": "3", "MAX": "7", "COUNT": "3", "STEP": "2"},
    ],
)
def test_array_with_gaps(changes: dict[str, str]) -> None:
    values = ARRAY | changes
    with pytest.raises(ValueError, match=r"from 3 to 7, which leave open .* or give --part"):
        part_of_array({f"SLURM_ARRAY_TASK_{name}": values[name] for name in values})


@pytest.mark.parametrize("value", ["x", "", "-1"])
def test_array_without_a_number(value: str) -> None:
    values = {f"SLURM_ARRAY_TASK_{name}": ARRAY[name] for name in ARRAY}
    with pytest.raises(ValueError, match=f"SLURM_ARRAY_TASK_ID = '{value}' is no number: unset"):
        part_of_array(values | {"SLURM_ARRAY_TASK_ID": value})
