"""Bit-equal runs: PyTorch's deterministic mode for as long as a run trains.

Two runs of one configuration, on the same devices and the same number of them, then have the same
bits. The parts that are ours need no mode: kernels without atomics, an order of data and random
numbers that are computed, reductions over processes in the order of the library's ring.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._inductor import config as inductor

from fastllama.errors import TrainingFailedError

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
# The two that NVIDIA promises the same bits for, whatever else the device is busy with:
# https://docs.nvidia.com/cuda/cublas/#results-reproducibility
_WORKSPACES = (":4096:8", ":16:8")


def fix_cublas_workspace() -> None:
    """Give cuBLAS a workspace of its own for each stream, before CUDA starts.

    Raises:
        ValueError: the environment asks for a workspace that does not give the same bits.
    """
    workspace = os.environ.setdefault(_WORKSPACE, _WORKSPACES[0])
    if workspace not in _WORKSPACES:
        raise ValueError(
            f"{_WORKSPACE} = {workspace} in the environment does not go with "
            f"training.deterministic; unset it, or use {' or '.join(_WORKSPACES)}."
        )


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """If `wanted`, have PyTorch, cuDNN and Inductor compute the same bits each time, or refuse.

    Raises:
        TrainingFailedError: an operator inside has no deterministic implementation.
    """
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    try:
        # Inductor would time kernels that sum in different orders and take the fastest.
        with inductor.patch(deterministic=True):
            yield
    except RuntimeError as error:
        refused = re.search(r"(\S+) does not have a deterministic implementation", str(error))
        if refused is None:
            raise
        raise TrainingFailedError(
            f"The operator {refused[1]} has no deterministic implementation on this device, and "
            "training.deterministic asks for one; replace the operator, or train with "
            "--training.deterministic false."
        ) from error
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.backends.cudnn.deterministic = cudnn
