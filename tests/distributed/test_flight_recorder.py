"""NCCL's flight recorder: its environment variables, and the error message that names its dumps."""

from pathlib import Path

import pytest

from fastllama.distributed import flight_recorder
from fastllama.distributed.failure_reports import report_first_failure
from fastllama.distributed.flight_recorder import record_collectives


def test_record_collectives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment: dict[str, str] = {}
    monkeypatch.setattr(flight_recorder.os, "environ", environment)
    assert record_collectives(tmp_path) == f"{tmp_path}/flight-recorder-"
    assert environment == {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": f"{tmp_path}/flight-recorder-",
    }


@pytest.mark.parametrize(
    "given",
    [
        {"TORCH_NCCL_TRACE_BUFFER_SIZE": "7", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "/elsewhere/x"},
        {"TORCH_FR_BUFFER_SIZE": "0", "TORCH_FR_DUMP_TEMP_FILE": "/elsewhere/x"},
    ],
)
def test_variables_of_the_user_stay(
    given: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {**given, "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}
    before = dict(environment)
    monkeypatch.setattr(flight_recorder.os, "environ", environment)
    assert record_collectives(tmp_path) == "/elsewhere/x"
    assert environment == before


def test_error_message_names_the_dumps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_FR_DUMP_TEMP_FILE", "runs/x/flight-recorder-")
    report_first_failure(3, RuntimeError("NCCL timed out"))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error: rank 3: RuntimeError: NCCL timed out"
    assert "runs/x/flight-recorder-RANK" in lines[1]
    report_first_failure(3, ValueError("a mistake"))
    assert "flight-recorder" not in capsys.readouterr().err
