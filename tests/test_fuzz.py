"""Damaged files of every kind: a few cases of each, and the faults that the fuzzer must find."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import tests.fuzz.supervisor as module
from tests.fuzz.cases import ALLOWED, Fuzzer
from tests.fuzz.supervisor import Supervisor
from tests.fuzz.targets import TARGETS, Target

N_CASES = 10
"""Cases of each target. `make test-all` goes on for a minute."""
TEXT = "text\n" * 100


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore after the test what a fuzzer sets."""
    for variable in ("HOME", "XDG_CACHE_HOME", "TMPDIR"):
        monkeypatch.setenv(variable, "/")


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files(tmp_path: Path, name: str) -> None:
    fuzzer = Fuzzer(tmp_path, 0, {name: TARGETS[name]})
    for number in range(N_CASES):
        outcome = fuzzer.run(number)
        assert outcome.kind in ALLOWED, f"case {number}: {outcome}"


def make_a_file(folder: Path) -> None:
    folder.mkdir()
    for name in ("file.txt", "other.txt"):
        (folder / name).write_text(TEXT)


def is_damaged(folder: Path) -> bool:
    paths = (folder / "file.txt", folder / "other.txt")
    return any(not path.is_file() or path.read_bytes() != TEXT.encode() for path in paths)


def with_a_bug(folder: Path, beside: Path) -> None:
    if is_damaged(folder):
        raise KeyError("a bug")


def without_a_name(folder: Path, beside: Path) -> None:
    if is_damaged(folder):
        raise ValueError("something is wrong")


def with_control_characters(folder: Path, beside: Path) -> None:
    print("file.txt other.txt \x1b[2J")


def without_a_word(folder: Path, beside: Path) -> bool:
    return is_damaged(folder)


def outside(folder: Path, beside: Path) -> None:
    if is_damaged(folder):
        (beside.parent / "outside" / "notes.json").write_text("overwritten")


@pytest.mark.parametrize(
    ("use", "kind"),
    [
        (with_a_bug, "traceback"),
        (without_a_name, "message"),
        (with_control_characters, "message"),
        (without_a_word, "silent"),
        (outside, "outside"),
    ],
)
def test_fault_is_found(tmp_path: Path, use: Callable[[Path, Path], object], kind: str) -> None:
    fuzzer = Fuzzer(tmp_path, 0, {"file": Target(make_a_file, use)})
    assert kind in {fuzzer.run(number).kind for number in range(5)}


def forever(folder: Path, beside: Path) -> None:
    time.sleep(3600 if is_damaged(folder) else 0)


def with_a_crash(folder: Path, beside: Path) -> None:
    if is_damaged(folder):
        os.abort()


def with_gigabytes(folder: Path, beside: Path) -> None:
    np.ones(2**27 + 2**25 if is_damaged(folder) else 1)


@pytest.mark.slow
def test_faults_of_processes_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HANG_SECONDS", 20)
    uses = {"hang": forever, "crash": with_a_crash, "memory": with_gigabytes}
    targets = {kind: Target(make_a_file, use) for kind, use in uses.items()}
    supervisor = Supervisor(1, 0, tmp_path, targets)
    deadline = time.monotonic() + 120
    while len(supervisor.outcomes) < len(uses) and time.monotonic() < deadline:
        supervisor.run(0.2)
    supervisor.stop()
    assert set(supervisor.outcomes) == {(kind, kind) for kind in uses}
    assert supervisor.n_faults == sum(supervisor.outcomes.values())
