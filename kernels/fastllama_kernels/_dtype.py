"""The types arithmetic is done in."""

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """float32 for half-width inputs, the input's own type for float32 and float64."""
    return torch.promote_types(x.dtype, torch.float32)


def check_kernel_dtypes(**tensors: Tensor) -> None:
    """Raise ValueError for a tensor of a type the kernels, which compute in float32, lack."""
    for name, x in tensors.items():
        if x.dtype not in KERNEL_DTYPES:
            raise ValueError(
                f"{name} is {x.dtype}, and the Triton operators take float32, bfloat16 and "
                "float16; the REFERENCE operators take every float type."
            )


def autocast_like_linear(weight: Tensor) -> Tensor:
    """The weight as `torch.nn.functional.linear` would use it: autocast, if that is on."""
    device = weight.device.type
    if torch.is_autocast_enabled(device):
        return weight.to(torch.get_autocast_dtype(device))
    return weight
