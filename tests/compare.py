"""The one comparator of the repository: as exact as plain PyTorch, measured against float64."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16)

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where kernels are tested; on the CPU in Triton's interpreter."""

Operator = Callable[..., Tensor | tuple[Tensor, ...]]


def assert_as_exact_as(actual: Tensor, plain: Tensor, truth: Tensor) -> None:
    """Require max|actual - truth| <= 2 max|plain - truth| + 4 eps max|truth|, truth in float64.

    The 2 is for the luck of one order of roundings over another, the 4 eps (of the dtype of
    `actual`) for the cases where plain PyTorch happens to make no error at all.
    """
    assert truth.dtype == torch.float64
    assert (actual.dtype, actual.shape) == (plain.dtype, truth.shape)
    error, allowed = ((x.double() - truth).abs().max() for x in (actual, plain))
    bound = 2 * allowed + 4 * torch.finfo(actual.dtype).eps * truth.abs().max()
    # NaN on either side compares false, so it fails here too.
    assert error <= bound, f"error {error:.3e}, at most {bound:.3e} allowed"


def assert_operator_as_exact_as(
    operator: Operator, plain: Operator, truth: Operator, inputs: Sequence[Tensor]
) -> None:
    """Hold every output of `operator` and every gradient of its `inputs` to the rule above.

    `truth` runs on the same inputs, already rounded to their dtype, widened to float64.
    """
    wide = [x.double() for x in inputs]
    runs = (
        outputs_and_gradients(operator, inputs),
        outputs_and_gradients(plain, inputs),
        outputs_and_gradients(truth, wide),
    )
    for actual, ordinary, exact in zip(*runs, strict=True):
        assert_as_exact_as(actual, ordinary, exact)


def outputs_and_gradients(operator: Operator, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs, then the gradients of `inputs` under random upstream gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = operator(*leaves)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    generator = torch.Generator().manual_seed(0)
    # Rounded to bfloat16 first, so that runs in every dtype get the very same numbers.
    upstream = [
        torch.randn(x.shape, generator=generator).bfloat16().to(x.device, x.dtype) for x in outputs
    ]
    return [x.detach() for x in outputs] + list(torch.autograd.grad(outputs, leaves, upstream))


def randn(
    *shape: int, seed: int, dtype: torch.dtype = torch.float64, device: str = DEVICE
) -> Tensor:
    """Standard normal values that depend on the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
