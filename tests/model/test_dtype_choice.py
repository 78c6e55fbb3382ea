"""The dtype in which a device is faster."""

import itertools

import pytest
import torch

from fastllama.model import dtype_choice
from fastllama.model.dtype_choice import faster_dtype


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [((2.0, 1.0), "bfloat16"), ((1.0, 0.9), "float32"), ((1, 2), "float32")],
)
def test_bfloat16_must_be_clearly_faster(
    seconds: tuple[float, float], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = dict(zip((torch.float32, torch.bfloat16), seconds, strict=True))
    monkeypatch.setattr(dtype_choice, "_matmul_seconds", times.__getitem__)
    assert faster_dtype(torch.device("cpu")) == expected
    assert faster_dtype(torch.device("cuda")) == "bfloat16"


@pytest.mark.parametrize(
    ("float32", "bfloat16"),
    [
        ([2.0], [9.0, 9.0, 9.0, 9.0, 1.0]),
        ([9.0, 9.0, 9.0, 9.0, 2.0], [1.0]),
        ([*15 * [12.0], 2.0], [*15 * [11.0], 1.0]),
    ],
    ids=["bfloat16", "float32", "both"],
)
@pytest.mark.parametrize("faster", ["bfloat16", "float32"])
def test_a_busy_moment_does_not_choose(
    float32: list[float], bfloat16: list[float], faster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Seconds of the first matmuls; the last number is that of all that follow.
    times = {torch.float32: float32, torch.bfloat16: bfloat16}
    if faster == "float32":
        times = {torch.float32: bfloat16, torch.bfloat16: float32}
    found = {
        dtype: itertools.chain(seconds, itertools.repeat(seconds[-1]))
        for dtype, seconds in times.items()
    }
    monkeypatch.setattr(dtype_choice, "_matmul_seconds", lambda dtype: next(found[dtype]))
    assert faster_dtype(torch.device("cpu")) == faster
