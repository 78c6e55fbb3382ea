"""Deterministic runs: PyTorch's deterministic mode for the duration of a training.

Two runs of one configuration on equal devices, and as many of them, then produce the same bits. Our
own code needs no mode: kernels use no atomics, data order and random numbers are functions of the
seed, and collectives reduce in the fixed order of the library's ring.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._inductor import config as inductor

from fastllama.errors import TrainingFailedError

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
# The two settings for which NVIDIA promises the same bits, whatever else the device runs:
# https://docs.nvidia.com/cuda/cublas/#results-reproducibility
_WORKSPACES = (":4096:8", ":16:8")


def fix_cublas_workspace() -> None:
    """Set a deterministic cuBLAS workspace. Call it before CUDA starts.

    Raises:
        ValueError: the environment sets a workspace that is not deterministic.
    """
    workspace = os.environ.setdefault(_WORKSPACE, _WORKSPACES[0])
    if workspace not in _WORKSPACES:
        raise ValueError(
            f"{_WORKSPACE} = {workspace} in the environment is not deterministic, and "
            f"training.deterministic is set; unset the variable, or use {' or '.join(_WORKSPACES)}."
        )


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """If `wanted`, make PyTorch, cuDNN and Inductor deterministic inside.

    Raises:
        TrainingFailedError: an operator inside has no deterministic implementation.
    """
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic
    memory: Any = torch.utils.deterministic  # Its attribute is unknown to type checkers.
    fill = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    # PyTorch would fill every new tensor, for code that reads memory before it writes it. No
    # operator of ours does.
    memory.fill_uninitialized_memory = False
    try:
        # Otherwise Inductor times kernels that sum in different orders and takes the fastest.
        with inductor.patch(deterministic=True), explained_nondeterminism():
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.backends.cudnn.deterministic = cudnn
        memory.fill_uninitialized_memory = fill


@contextmanager
def explained_nondeterminism() -> Iterator[None]:
    """Replace PyTorch's error about an operator that is not deterministic by a sentence.

    Raises:
        TrainingFailedError: an operator inside has no deterministic implementation.
    """
    try:
        yield
    except RuntimeError as error:
        missing = re.search(r"(\S+) does not have a deterministic implementation", str(error))
        if missing is None:
            raise
        raise TrainingFailedError(
            f"The operator {missing[1]} has no deterministic implementation on this device, and "
            "training.deterministic is set; replace the operator, or train with "
            "--training.deterministic false."
        ) from error
