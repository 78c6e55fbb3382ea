"""The GPU suite saves every result, even if a part fails. Runs as a rehearsal on a CPU."""

import math
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import gpu_suite
from benchmarks.conditions import current_conditions
from benchmarks.gpu_suite import (
    DEVICE_LOST,
    PARTS,
    Part,
    run_part,
    run_suite,
    run_tests,
    spawn_part,
)
from benchmarks.operators.measure import Cell, cells
from benchmarks.results import Ceiling, Check, KernelTime, Spread, append, read

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_suite.py"


def test_command_runs_a_part(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--parts", "ceilings", "--minutes", "2"]
    command += ["--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rehearsal on the CPU" in done.stdout
    records = list(read(tmp_path, Ceiling))
    assert {"copy", "matmul", "attention forward"} <= {ceiling.name for _, ceiling in records}
    assert all(conditions.is_rehearsal for conditions, _ in records)
    assert [check for _, check in read(tmp_path, Check)] == [Check("part ceilings", True, "")]


def test_part_out_of_time_keeps_its_records(tmp_path: Path) -> None:
    started = time.time()
    # Without ceilings there are no floors, so this part crashes.
    crashed = spawn_part("kernels", tmp_path, started + 60, started + 60)
    assert "exit 1: ValueError: no ceilings" in crashed
    failure = spawn_part("ceilings", tmp_path, started, started + 60)
    assert failure == "out of time; earlier results are saved"
    assert len(list(read(tmp_path, Ceiling))) == 1
    # Killed before its first record: the existing files stay readable.
    assert "stopped" in spawn_part("ceilings", tmp_path, time.time() + 60, time.time())
    assert len(list(read(tmp_path, Ceiling))) == 1
    assert list(read(tmp_path, KernelTime)) == []


def test_each_part_gets_a_share_of_the_remaining_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares: dict[str, float] = {}

    def spawn(name: str, folder: Path, deadline: float, limit: float) -> str:
        shares[name] = deadline - time.time()
        return "exit 1: it crashed" if name == "checks" else ""

    monkeypatch.setattr(gpu_suite, "spawn_part", spawn)
    shown = StringIO()
    assert not run_suite(list(PARTS), tmp_path, 9.0, Console(file=shown))
    # The fake parts take no time, so the shares of later parts grow.
    assert list(shares) == list(PARTS)
    assert shares["checks"] == pytest.approx(
        530 * PARTS["checks"][1] / sum(weight for _, weight in PARTS.values()), rel=0.02
    )
    assert shares["tests"] == pytest.approx(530, rel=0.02)
    assert "checks: 0 s" in shown.getvalue()
    failed = [check.name for _, check in read(tmp_path, Check) if not check.passed]
    assert failed == ["part checks"]


def kernel_time(cell: Cell, failure: str = "") -> KernelTime:
    return KernelTime(
        operator=cell.benchmark.operator,
        phase=cell.phase,
        recipe=cell.recipe,
        shape=cell.shape,
        dtype="float32",
        provider=cell.provider.name,
        timer="graph",
        device_s=None if failure else Spread(1.0, 1.0, 1.0, 1),
        host_s=None,
        peak_bytes=None,
        error=None,
        bytes=1.0,
        flops=0.0,
        floor_s=1.0,
        failure=failure,
    )


def test_kernels_resume_after_device_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conditions = current_conditions()
    for name, dtype in (("copy", "uint8"), ("matmul", "bfloat16"), ("matmul", "float32")):
        rate = Spread(1.0, 1.0, 1.0, 1)
        append(tmp_path, conditions, [Ceiling(name, "pytorch", {}, dtype, rate)])
    measured: list[str] = []

    def measure(cell: Cell, device: object, floors: object) -> KernelTime:
        measured.append(str(cell))
        # The second cell fails; the fourth also breaks the device.
        return kernel_time(cell, "broken" if len(measured) in (2, 4) else "")

    monkeypatch.setattr(gpu_suite, "measure", measure)
    monkeypatch.setattr(gpu_suite, "device_is_usable", lambda: len(measured) != 4)
    part = Part(tmp_path, time.time() + 60, conditions)
    with pytest.raises(SystemExit) as stopped:
        gpu_suite.kernels(part)
    assert stopped.value.code == DEVICE_LOST
    assert len(measured) == 4
    gpu_suite.kernels(part)
    # Each cell runs once, fastllama first.
    assert len(measured) == len(set(measured)) == len(list(read(tmp_path, KernelTime)))
    ours = [cell.endswith("-fastllama") for cell in measured]
    assert ours == sorted(ours, reverse=True)


def test_part_reruns_while_it_adds_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some_cell = next(cells(["quickstart"], [torch.float32]))
    n_runs = 0

    def spawn(name: str, folder: Path, deadline: float, limit: float) -> str:
        nonlocal n_runs
        n_runs += 1
        if n_runs < 3:
            append(folder, current_conditions(), [kernel_time(some_cell, "broken")])
        return f"exit {DEVICE_LOST}: illegal memory access"

    monkeypatch.setattr(gpu_suite, "spawn_part", spawn)
    assert "illegal memory access" in run_part("kernels", tmp_path, time.time() + 60)
    assert n_runs == 3
    monkeypatch.setattr(gpu_suite, "spawn_part", lambda *arguments: "exit 1: KeyError")
    assert run_part("kernels", tmp_path, time.time() + 60) == "exit 1: KeyError"


@pytest.mark.slow  # It waits for a deadline that pytest meets on a busy machine.
def test_timed_out_tests_report_failures_so_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "test_wrong.py").write_text("def test_wrong():\n    assert 1 == 2\n")
    (tmp_path / "test_long.py").write_text("import time\ndef test_long():\n    time.sleep(600)\n")
    monkeypatch.setattr(gpu_suite, "KERNEL_TESTS", tmp_path)
    part = Part(tmp_path, math.inf, current_conditions())
    files = ["test_wrong.py", "test_long.py"]
    # On a busy machine pytest takes longer to start, and to report.
    monkeypatch.setattr(gpu_suite, "GRACE", 120.0)
    # As in the background of a script.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        check = run_tests(part, "some tests", files, [], time.time() + 15)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not check.passed
    assert check.detail.startswith("cut off:")
    assert "assert 1 == 2" in (tmp_path / "some-tests.txt").read_text()
    assert run_tests(part, "no tests", ["test_wrong.py"], ["-k", "right"], math.inf).passed is False


def test_no_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        gpu_suite, "spawn_part", lambda *arguments: pytest.fail("a part was started")
    )
    assert not run_suite(["checks"], tmp_path, 0.1, Console(file=StringIO()))
    assert [check.detail for _, check in read(tmp_path, Check)] == ["no time left"]


def test_refuses_results_of_another_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTLLAMA_COMMIT", "aaaa")
    append(tmp_path, current_conditions(), [Check("part checks", True, "")])
    monkeypatch.setenv("FASTLLAMA_COMMIT", "bbbb")
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        gpu_suite.main()
    assert stopped.value.code == 2
    assert "holds results of commit aaaa, but this is bbbb" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--minutes", "0.5"), "--minutes 0.5 is too short"), (("--parts", "all"), "invalid choice")],
)
def test_wrong_arguments(
    options: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", *options])
    with pytest.raises(SystemExit) as stopped:
        gpu_suite.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
