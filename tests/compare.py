"""The comparator of the repository: as exact as plain PyTorch, measured against float64."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16)

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where tests run the kernels; on the CPU they run in Triton's interpreter."""

Operator = Callable[..., Tensor | tuple[Tensor, ...]]


def assert_as_exact_as(
    actual: Tensor, plain: Tensor, truth: Tensor, computed_in: torch.dtype | None = None
) -> None:
    """Require max|actual - truth| <= 2 max|plain - truth| + 4 eps max|truth|, truth in float64.

    The factor 2 allows for another order of roundings. The 4 eps cover the cases where plain
    PyTorch happens to make no error. They are of `computed_in`, the dtype of autocast, or of
    `actual`.
    """
    assert truth.dtype == torch.float64
    assert (actual.dtype, actual.shape) == (plain.dtype, truth.shape)
    error, allowed = ((x.double() - truth).abs().max() for x in (actual, plain))
    bound = 2 * allowed + 4 * torch.finfo(computed_in or actual.dtype).eps * truth.abs().max()
    # Written so that NaN fails.
    assert error <= bound, f"error {error:.3e}, at most {bound:.3e} allowed"


def assert_rounded_once(actual: Tensor, truth: Tensor, magnitude: float = 1.0) -> None:
    """Require that each entry is one of the two neighbours of the float32 result.

    `magnitude` is the size of the numbers in the float32 arithmetic. The entry need not be the
    nearest neighbour: Triton's interpreter truncates to bfloat16, a GPU rounds.
    """
    info = torch.finfo(actual.dtype)
    _, exponent = torch.frexp(truth)
    unit = torch.ldexp(torch.full_like(truth, info.eps), exponent - 1)
    unit = unit.clamp(min=info.smallest_normal * info.eps)
    slack = 4 * torch.finfo(torch.float32).eps * magnitude
    assert ((actual.double() - truth).abs() <= unit + slack).all()


def assert_operator_as_exact_as(
    operator: Operator,
    plain: Operator,
    truth: Operator,
    inputs: Sequence[Tensor],
    computed_in: torch.dtype | None = None,
) -> None:
    """Apply `assert_as_exact_as` to every output of `operator` and to the gradients of `inputs`.

    `truth` runs on the same inputs, rounded to their dtype and then widened to float64.
    """
    wide = [x.double() for x in inputs]
    runs = (
        outputs_and_gradients(operator, inputs),
        outputs_and_gradients(plain, inputs),
        outputs_and_gradients(truth, wide),
    )
    for results in zip(*runs, strict=True):
        assert_as_exact_as(*results, computed_in)


def outputs_and_gradients(operator: Operator, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the outputs, then the gradients of `inputs`, for random upstream gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = operator(*leaves)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    generator = torch.Generator().manual_seed(0)
    # Rounded to bfloat16 first, so that every dtype gets the same numbers.
    upstream = [
        torch.randn(x.shape, generator=generator).bfloat16().to(x.device, x.dtype) for x in outputs
    ]
    return [x.detach() for x in outputs] + list(torch.autograd.grad(outputs, leaves, upstream))


def randn(
    *shape: int, seed: int, dtype: torch.dtype = torch.float64, device: str = DEVICE
) -> Tensor:
    """Standard normal values that depend only on the seed and the shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
