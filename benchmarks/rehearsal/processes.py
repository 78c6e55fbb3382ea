"""Runs a case in a process on the null device."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from benchmarks.rehearsal.build import environment
from benchmarks.rehearsal.case import Case, Measured
from benchmarks.rehearsal.log import Call, read_log


class Rehearsed(NamedTuple):
    """A case and what its process left."""

    case: Case
    measured: Measured | None
    calls: list[Call]
    failure: str
    """The last line of a process that failed."""


def rehearse(case: Case, *, libraries: Path, folder: Path) -> Rehearsed:
    """Run one case in a process on the null device."""
    files = folder / f"{case.recipe}, {case.name} {case.mistake}".strip()
    files.mkdir()
    variables = {
        "TORCHINDUCTOR_CACHE_DIR": str(libraries / "inductor"),
        "TRITON_CACHE_DIR": str(libraries / "triton"),
        "XDG_CACHE_HOME": str(files),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
    if case.ranks > 1:
        # As torchrun sets them; the null device meets nobody.
        variables |= {"RANK": "0", "WORLD_SIZE": str(case.ranks), "LOCAL_RANK": "0"}
        variables |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    command = [sys.executable, "-m", "benchmarks.rehearsal.step", json.dumps(asdict(case))]
    done = subprocess.run(
        [*command, str(files)],
        capture_output=True,
        text=True,
        check=False,
        env=environment(libraries, **variables),
    )
    if done.returncode:
        (files / "error.log").write_text(done.stdout + done.stderr)
        lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
        return Rehearsed(case, None, [], lines[-1])
    measured = Measured(**json.loads((files / "measured.json").read_text()))
    return Rehearsed(case, measured, read_log(files / "update.log"), "")
