"""Forks of a server: exit codes, time limits, output, and what they inherit."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from benchmarks.forks import run_forked


def end(how: str) -> None:
    print("a line")
    print("another", file=sys.stderr, flush=True)
    if how == "exception":
        raise ValueError("no ceilings")
    if how == "exit":
        sys.exit(3)
    if how == "signal":
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("how", "code", "last_line"),
    [
        ("return", 0, "another"),
        ("exception", 1, "ValueError: no ceilings"),
        ("exit", 3, "another"),
        ("signal", -9, "another"),
    ],
)
def test_exit_code_and_output(how: str, code: int, last_line: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert run_forked(end, (how,), log, timeout=60) == code
    lines = log.read_text().splitlines()
    assert lines[-1] == last_line
    assert how == "signal" or "a line" in lines


def sleep_until_told(folder: Path) -> None:
    try:
        (folder / "started").touch()
        time.sleep(600)
    finally:
        (folder / "ended").touch()


def test_time_limit(tmp_path: Path) -> None:
    assert run_forked(sleep_until_told, (tmp_path,), tmp_path / "log", timeout=1.0) is None
    assert (tmp_path / "ended").exists()


def end_while_another_sleeps(folder: Path) -> None:
    def end() -> None:
        while not (folder / "started").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end).start()
    run_forked(sleep_until_told, (folder,), folder / "inner log", timeout=60)


def test_fork_that_ends_ends_its_forks(tmp_path: Path) -> None:
    code = run_forked(end_while_another_sleeps, (tmp_path,), tmp_path / "log", timeout=60)
    assert code == 128 + signal.SIGTERM
    assert (tmp_path / "ended").exists()


def write_origin(path: Path) -> None:
    modules = "torch._inductor.compile_fx", "benchmarks.gpu_suite"
    path.write_text(json.dumps([os.getppid(), [name in sys.modules for name in modules]]))


def test_forks_share_the_imports_of_one_server(tmp_path: Path) -> None:
    origins = []
    for number in range(2):
        path = tmp_path / str(number)
        assert run_forked(write_origin, (path,), tmp_path / "log", timeout=60) == 0
        origins.append(json.loads(path.read_text()))
    server = origins[0][0]
    assert server != os.getpid()
    assert origins == 2 * [[server, [True, True]]]
