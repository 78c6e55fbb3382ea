import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastllama_kernels.rms_norm import add_rms_norm_reference, rms_norm_reference
from tests.compare import DTYPES, assert_operator_as_exact_as, randn

WIDTH = 24


def formula(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps) * weight


# 0.5 is of the size of the mean square, so that an eps at another place shows.
@pytest.mark.parametrize("eps", [1e-5, 0.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_is_its_formula(dtype: torch.dtype, eps: float) -> None:
    inputs = [randn(3, 5, WIDTH, seed=0, dtype=dtype), randn(WIDTH, seed=1, dtype=dtype)]
    assert_operator_as_exact_as(
        lambda x, weight: rms_norm_reference(x, weight, eps),
        lambda x, weight: F.rms_norm(x, (WIDTH,), weight, eps),
        lambda x, weight: formula(x, weight, eps),
        inputs,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_with_residual_returns_the_sum_too(dtype: torch.dtype) -> None:
    inputs = [randn(4, WIDTH, seed=seed, dtype=dtype) for seed in (0, 1)]
    inputs.append(randn(WIDTH, seed=2, dtype=dtype))
    assert_operator_as_exact_as(
        lambda x, residual, weight: add_rms_norm_reference(x, residual, weight, 1e-5),
        lambda x, residual, weight: (
            F.rms_norm(x + residual, (WIDTH,), weight, 1e-5),
            x + residual,
        ),
        lambda x, residual, weight: (formula(x + residual, weight, 1e-5), x + residual),
        inputs,
    )


def test_gradients_are_the_slopes() -> None:
    inputs = [randn(2, 6, seed=0), randn(2, 6, seed=1), randn(6, seed=2)]
    leaves = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(
        lambda x, residual, weight: add_rms_norm_reference(x, residual, weight, 1e-2), leaves
    )


def test_zeros_stay_zero() -> None:
    x = torch.zeros(WIDTH, requires_grad=True)
    y = rms_norm_reference(x, torch.ones(WIDTH), 1e-5)
    (gradient,) = torch.autograd.grad(y, x, randn(WIDTH, seed=0, dtype=torch.float32))
    assert not y.any()
    assert gradient.isfinite().all()


def test_squares_do_not_overflow_in_float16() -> None:
    # 300 squared is beyond the largest float16, 65504.
    x = torch.full((WIDTH,), 300.0, dtype=torch.float16)
    torch.testing.assert_close(rms_norm_reference(x, torch.ones_like(x), 1e-5), torch.ones_like(x))
