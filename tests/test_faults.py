"""A few kills of `make faults`: no checkpoint is lost, and runs resume bit-identically."""

import re
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_killed_trainings_resume_bit_identically() -> None:
    command = [sys.executable, "-m", "tests.faults", "--kills", "3", "--layouts", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    # A training may finish before its kill. Then another one is started.
    assert re.search(r"^3 kills of \d trainings .* 0 failed", done.stdout, re.MULTILINE)
    assert "losses, weights, moments bit-equal" in done.stdout
