"""Results survive a round trip; damaged files raise a clear error."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.results import (
    FILES,
    SCHEMA,
    Ceiling,
    Check,
    Conditions,
    KernelTime,
    ProfileShare,
    Spread,
    TrainingRun,
    Tuning,
    append,
    read,
)

CONDITIONS = Conditions(
    date="2026-11-22T10:00:00+00:00",
    commit="abc1234",
    device="NVIDIA H200",
    is_rehearsal=False,
    n_multiprocessors=132,
    memory_bytes=141 * 10**9,
    python="3.11.9",
    torch="2.13.0",
    triton="3.6.0",
    cuda="12.8",
    cudnn="91002",
    driver="570.1",
    power_limit_watts=700.0,
    max_sm_clock_mhz=None,
)
SPREAD = Spread(2.0, 1.5, 3.0, 7)
TIMED = KernelTime(
    operator="rope",
    phase="forward",
    recipe="llama-1b",
    shape={"B": 8, "T": 2048},
    dtype="bfloat16",
    provider="fastllama",
    timer="graph",
    device_s=SPREAD,
    host_s=None,
    peak_bytes=0,
    error=1e-3,
    bytes=4e6,
    flops=0.0,
    floor_s=1.0,
)
FAILED = KernelTime(
    "rope", "backward", "llama-1b", {"B": 8}, "bfloat16", "peer", "graph",
    None, None, None, None, 4e6, 0.0, 1.0, failure='RuntimeError: "[a],\n{b}"',
)  # fmt: skip
RUN = TrainingRun(
    "fastllama", "llama-1b", "bfloat16", 2048, 16, 2**19, 10**9, SPREAD, 5e4, 0.4, 0.5, 0.45,
    6e4, "assumed", 10**10, 30.0, losses=[11.0, 7.5], parity="", details="attention: cudnn",
)  # fmt: skip
RECORDS: dict[type, list[Any]] = {
    Ceiling: [Ceiling("copy", "pytorch", {"bytes": 2**32}, "uint8", SPREAD)],
    Check: [Check("finite", True, "0 of 10"), Check("equal", False, "line\nbreak ]")],
    KernelTime: [TIMED, FAILED],
    TrainingRun: [RUN],
    ProfileShare: [ProfileShare("llama-1b", "idle", 0.1, 0.05, 3, None)],
    Tuning: [
        Tuning("rope", "llama-1b", 2**14, "bfloat16", {"num_warps": 8}, "tried", SPREAD, 1e-5),
        Tuning(
            "rope", "llama-1b", 8, "bfloat16", {"num_warps": 64}, "tried", None, 1.0, "too many"
        ),
    ],
}


def all_records() -> list[Any]:
    return [record for records in RECORDS.values() for record in records]


def test_round_trip(tmp_path: Path) -> None:
    append(tmp_path / "new" / "folder", CONDITIONS, all_records())
    for kind, records in RECORDS.items():
        expected = [(CONDITIONS, record) for record in records]
        assert list(read(tmp_path / "new" / "folder", kind)) == expected


def test_no_files_for_absent_kinds(tmp_path: Path) -> None:
    append(tmp_path, CONDITIONS, [TIMED])
    assert [file.name for file in tmp_path.iterdir()] == ["kernels.json"]
    assert list(read(tmp_path, TrainingRun)) == []


def test_append_keeps_earlier_records(tmp_path: Path) -> None:
    for _ in range(3):
        append(tmp_path, CONDITIONS, all_records())
    for kind, records in RECORDS.items():
        text = (tmp_path / FILES[kind]).read_text()
        entries = json.loads(text)
        assert [record for _, record in read(tmp_path, kind)] == 3 * records
        lines = text.splitlines()
        assert [lines[0], lines[-1]] == ["[", "]"]
        assert [json.loads(line.rstrip(",")) for line in lines[1:-1]] == entries
        assert all(entry["schema"] == SCHEMA for entry in entries)


def entry_with(**changes: Any) -> str:
    entry = {"schema": SCHEMA, "name": "finite", "passed": True, "detail": ""}
    conditions = {name: getattr(CONDITIONS, name) for name in CONDITIONS.__dataclass_fields__}
    return json.dumps([entry | {"conditions": conditions} | changes])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value"),
        ("[\n{]\n", "Expecting property name"),
        ('{"schema": 1}', "not a list"),
        ("[1]", "pop"),
        ("[{}]", "schema"),
        (entry_with(schema=SCHEMA + 1), f"schema {SCHEMA + 1} is newer than {SCHEMA}"),
        (entry_with(schema="one"), "not supported"),
        (entry_with(conditions={"device": "H200"}), "missing"),
        (entry_with(passes=True), "passes"),
    ],
)
def test_damaged_file_raises(tmp_path: Path, text: str, reason: str) -> None:
    file = tmp_path / FILES[Check]
    file.write_text(text)
    with pytest.raises(ValueError, match="is not a results file") as error:
        list(read(tmp_path, Check))
    message = str(error.value)
    assert str(file) in message
    assert reason in message
    assert "remove it" in message
    assert "\n" not in message


def test_valid_check_file(tmp_path: Path) -> None:
    """The damaged files above differ from this one only in their defect."""
    (tmp_path / FILES[Check]).write_text(entry_with())
    assert list(read(tmp_path, Check)) == [(CONDITIONS, Check("finite", True, ""))]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 20, 101])
def test_spread_matches_numpy_percentiles(n: int) -> None:
    samples = np.random.default_rng(n).lognormal(size=n).tolist()
    spread = Spread.of(samples)
    expected = np.percentile(samples, [25, 50, 75])
    np.testing.assert_allclose([spread.low, spread.median, spread.high], expected, rtol=1e-12)
    assert spread.n == n
    np.testing.assert_allclose(spread.noise, (expected[2] - expected[0]) / expected[1], atol=1e-12)


def test_spread_map() -> None:
    """Exact for 4k + 1 samples, where the percentiles are samples."""
    samples = np.random.default_rng(0).lognormal(size=21).tolist()
    spread = Spread.of(samples)
    for function in (lambda seconds: 1e6 / seconds, lambda seconds: 3 * seconds):
        mapped, expected = spread.map(function), Spread.of([function(s) for s in samples])
        assert mapped.low <= mapped.median <= mapped.high
        np.testing.assert_allclose(
            [mapped.low, mapped.median, mapped.high],
            [expected.low, expected.median, expected.high],
        )
        assert mapped.n == 21


def test_shares_use_medians() -> None:
    assert TIMED.share_of_floor == 0.5
    assert FAILED.share_of_floor is None
    assert RUN.share_of_bound == pytest.approx(5 / 6)
