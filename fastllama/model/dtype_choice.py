"""The dtype in which a device is faster."""

import time
from typing import Literal

import torch


def faster_dtype(device: torch.device) -> Literal["bfloat16", "float32"]:
    """The dtype in which `device` multiplies matrices faster.

    CUDA devices are faster in bfloat16. A CPU with instructions for bfloat16 is about twice as fast
    in it. Any other converts each operand, and is slower in it; a short measurement tells.
    """
    if device.type == "cuda":
        return "bfloat16"
    seconds = {dtype: _matmul_seconds(dtype) for dtype in (torch.float32, torch.bfloat16)}
    return "bfloat16" if seconds[torch.bfloat16] < 0.8 * seconds[torch.float32] else "float32"


def _matmul_seconds(dtype: torch.dtype) -> float:
    """Seconds of one matmul, the shortest of several: anything else on the machine delays some."""
    x = torch.ones(512, 512, dtype=dtype)
    found = []
    for _ in range(5):
        began = time.perf_counter()
        x @ x
        found.append(time.perf_counter() - began)
    return min(found)
