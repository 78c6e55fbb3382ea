"""The dtype in which a device is faster."""

import math
import time
from typing import Literal

import torch

ROUNDS = range(5, 26)
"""How often each dtype is timed: at least 5 times, and 25 times while both are about as fast."""


def faster_dtype(device: torch.device) -> Literal["bfloat16", "float32"]:
    """The dtype in which `device` multiplies matrices faster.

    CUDA devices are faster in bfloat16. A CPU with instructions for bfloat16 is about twice as fast
    in it. Any other converts each operand, and is slower in it; a short measurement tells.
    """
    if device.type == "cuda":
        return "bfloat16"
    fastest = {torch.float32: math.inf, torch.bfloat16: math.inf}
    for n_rounds in range(1, ROUNDS.stop):
        for dtype in fastest:
            # Anything else on the machine delays some, or all for a few milliseconds.
            fastest[dtype] = min(fastest[dtype], _matmul_seconds(dtype))
        ratio = fastest[torch.bfloat16] / fastest[torch.float32]
        if n_rounds in ROUNDS and not 0.8 <= ratio < 1.5:
            break
    return "bfloat16" if ratio < 0.8 else "float32"


def _matmul_seconds(dtype: torch.dtype) -> float:
    """Seconds of one matmul."""
    x = torch.ones(512, 512, dtype=dtype)
    began = time.perf_counter()
    x @ x
    return time.perf_counter() - began
