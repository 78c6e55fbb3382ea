"""The dtype in which a device is faster."""

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
