"""A run that goes on with other ranks, replicas and micro-batches; see tests/elastic.py."""

import json
import subprocess
import sys
from typing import Any

import pytest

# With several files a rank, which else only larger models have.
CODE = """
from tests import elastic
import fastllama.checkpoints.writing
fastllama.checkpoints.writing.FILE_BYTES = 2**15
elastic.main()
"""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_every_layout_goes_on_with_the_same_losses(found: dict[str, Any]) -> None:
    assert len(found["changing"]) == 15
    # A run that learns nothing would agree as well.
    assert found["changing"][-1] < found["changing"][0] - 0.5
    # Other layouts sum the same float32 terms in another order; 15 updates at a learning rate of
    # 1e-2 amplify it.
    assert found["changing"] == pytest.approx(found["straight"], rel=1e-5)


def test_every_layout_loads_every_bit_and_saves_it_once(found: dict[str, Any]) -> None:
    expected = {"same": True, "elements": found["elements"]}
    assert found["layouts"] == dict.fromkeys(found["layouts"], expected)
    assert len(found["layouts"]) == 5
