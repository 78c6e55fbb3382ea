"""What a run computes with, decided for its device: `training.dtype` and `training.compile`."""

import dataclasses
import time
from typing import Literal

import torch

from fastllama.config import Config
from fastllama.distributed.compilation import missing_compiler
from fastllama.distributed.world import World


def resolve_computation(config: Config, world: World) -> Config:
    """Decide "auto" of `training.dtype` and `training.compile`, for all ranks alike."""

    def resolved() -> Config:
        training, on_cuda = config.training, world.device.type == "cuda"
        dtype, compiles = training.dtype, training.compile
        if dtype == "auto":
            dtype = "bfloat16" if on_cuda else faster_dtype()
        if compiles == "auto":
            compiles = on_cuda or missing_compiler() is None
        training = dataclasses.replace(training, dtype=dtype, compile=compiles)
        return dataclasses.replace(config, training=training)

    return world.from_main(resolved)


def faster_dtype() -> Literal["bfloat16", "float32"]:
    """The dtype in which this CPU multiplies matrices faster.

    A CPU with instructions for bfloat16 is about twice as fast in it. Any other converts each
    operand, and is slower in it.
    """
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
