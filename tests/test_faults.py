"""A few of the kills of `make faults`: nothing complete is lost, and the trajectory stays exact."""

import re
import subprocess
import sys


def test_killed_trainings_go_on_exactly() -> None:
    command = [sys.executable, "-m", "tests.faults", "--kills", "3", "--layouts", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    # A training that is done before its next kill makes room for another.
    assert re.search(r"^3 kills of \d trainings .* 0 failed", done.stdout, re.MULTILINE)
    assert "losses, weights, moments bit-equal" in done.stdout
