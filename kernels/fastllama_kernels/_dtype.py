"""Checks and choices of dtype that the operators share."""

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """float32 for bfloat16 and float16 inputs, else the dtype of `x`."""
    return torch.promote_types(x.dtype, torch.float32)


def check_kernel_dtypes(**tensors: Tensor) -> None:
    """Raise ValueError for a dtype the kernels lack; they compute in float32."""
    for name, x in tensors.items():
        if x.dtype not in KERNEL_DTYPES:
            raise ValueError(
                f"{name} is {x.dtype}, and the Triton operators take float32, bfloat16 and "
                "float16; the REFERENCE operators take every float dtype."
            )


def autocast_like_linear(weight: Tensor) -> Tensor:
    """Cast `weight` the way autocast does inside `torch.nn.functional.linear`."""
    device = weight.device.type
    if torch.is_autocast_enabled(device):
        return weight.to(torch.get_autocast_dtype(device))
    return weight
