"""The suite keeps what it measured, whatever becomes of a part; rehearsed on a CPU."""

import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import gpu_suite
from benchmarks.conditions import current_conditions
from benchmarks.gpu_suite import PARTS, run_suite, spawn_part
from benchmarks.results import Ceiling, Check, KernelTime, append, read

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_suite.py"


def test_a_part_from_the_command_to_the_records(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--parts", "ceilings", "--minutes", "2"]
    command += ["--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rehearsal on the CPU" in done.stdout
    records = list(read(tmp_path, Ceiling))
    assert {"copy", "matmul", "attention forward"} <= {ceiling.name for _, ceiling in records}
    assert all(conditions.is_rehearsal for conditions, _ in records)
    assert [check for _, check in read(tmp_path, Check)] == [Check("part ceilings", True, "")]


def test_a_part_out_of_time_keeps_its_records(tmp_path: Path) -> None:
    started = time.time()
    # No ceilings, so the floors are missing: a crash is told, and where to read about it.
    assert "exit 1: KeyError" in spawn_part("kernels", tmp_path, started + 60, started + 60)
    failure = spawn_part("ceilings", tmp_path, started, started + 60)
    assert failure == "out of time; what it measured before is kept"
    assert len(list(read(tmp_path, Ceiling))) == 1
    # Stopped from outside, it has none, and the files there are still good.
    assert "stopped" in spawn_part("ceilings", tmp_path, time.time() + 60, time.time() + 1)
    assert len(list(read(tmp_path, Ceiling))) == 1
    assert list(read(tmp_path, KernelTime)) == []


def test_every_part_gets_its_share_of_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares: dict[str, float] = {}

    def spawn(name: str, folder: Path, deadline: float, limit: float) -> str:
        shares[name] = deadline - time.time()
        return "exit 1: it crashed" if name == "checks" else ""

    monkeypatch.setattr(gpu_suite, "spawn_part", spawn)
    shown = StringIO()
    assert not run_suite(list(PARTS), tmp_path, 9.0, Console(file=shown))
    # Nothing was used, so each part could have had all that the ones before it left.
    assert list(shares) == list(PARTS)
    assert shares["checks"] == pytest.approx(
        530 * 60 / sum(weight for _, weight in PARTS.values()), rel=0.02
    )
    assert shares["tests"] == pytest.approx(530, rel=0.02)
    assert "checks: 0 s" in shown.getvalue()
    failed = [check.name for _, check in read(tmp_path, Check) if not check.passed]
    assert failed == ["part checks"]


def test_no_time_left_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_suite, "spawn_part", lambda *arguments: pytest.fail("was started"))
    assert not run_suite(["checks"], tmp_path, 0.1, Console(file=StringIO()))
    assert [check.detail for _, check in read(tmp_path, Check)] == ["no time left"]


def test_results_of_two_commits_are_not_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTLLAMA_COMMIT", "aaaa")
    append(tmp_path, current_conditions(), [Check("part checks", True, "")])
    monkeypatch.setenv("FASTLLAMA_COMMIT", "bbbb")
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        gpu_suite.main()
    assert stopped.value.code == 2
    assert "holds results of aaaa, and this is bbbb" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--minutes", "0.5"), "--minutes 0.5 is too short"), (("--parts", "all"), "invalid choice")],
)
def test_mistakes_are_a_sentence(
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
