"""A run that resumes on other ranks and replicas and with other micro-batches: tests/elastic.py."""

import json
import subprocess
import sys
from typing import Any

import pytest

# Half a minute on all cores. Other tests resume with one change at a time.
pytestmark = pytest.mark.slow

# Small files, so that each rank writes several, as for a larger model.
CODE = """
from tests import elastic
import fastllama.checkpoints.writing
fastllama.checkpoints.writing.FILE_BYTES = 2**15
elastic.main()
"""


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_losses_do_not_depend_on_the_layout(results: dict[str, Any]) -> None:
    resumed = results["resumed"]
    assert len(resumed) == 15
    # Two runs that learn nothing would agree too.
    assert resumed[-1] < resumed[0] - 0.5
    # Other layouts sum the same float32 terms in another order; 15 updates at a learning rate of
    # 1e-2 amplify the rounding.
    assert resumed == pytest.approx(results["uninterrupted"], rel=1e-5)


def test_every_layout_loads_every_bit_and_saves_it_once(results: dict[str, Any]) -> None:
    expected = {"same": True, "elements": results["elements"]}
    assert results["layouts"] == dict.fromkeys(results["layouts"], expected)
    assert len(results["layouts"]) == 5
