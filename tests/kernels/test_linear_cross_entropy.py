import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastllama_kernels.linear_cross_entropy import linear_cross_entropy_reference
from tests.compare import DTYPES, assert_operator_as_exact_as, outputs_and_gradients, randn

D, V = 16, 11
TARGETS = torch.tensor([[3, -100, 0, 10], [-100, 3, 7, 7]])


def two_steps(hidden: Tensor, weight: Tensor) -> Tensor:
    logits = torch.einsum("btd,vd->btv", hidden, weight)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide.reshape(-1, V), TARGETS.reshape(-1))


def token_by_token(hidden: Tensor, weight: Tensor) -> Tensor:
    losses = []
    for b, t in (TARGETS != -100).nonzero().tolist():
        likelihoods = torch.exp(weight @ hidden[b, t])
        losses.append(-torch.log(likelihoods[TARGETS[b, t]] / likelihoods.sum()))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_the_mean_negative_log_likelihood(dtype: torch.dtype) -> None:
    inputs = [randn(2, 4, D, seed=0, dtype=dtype), randn(V, D, seed=1, dtype=dtype)]
    assert_operator_as_exact_as(
        lambda hidden, weight: linear_cross_entropy_reference(hidden, weight, TARGETS),
        two_steps,
        token_by_token,
        inputs,
    )


def test_gradients_are_the_slopes() -> None:
    leaves = [randn(2, 4, 3, seed=0).requires_grad_(), randn(V, 3, seed=1).requires_grad_()]
    assert torch.autograd.gradcheck(
        lambda hidden, weight: linear_cross_entropy_reference(hidden, weight, TARGETS), leaves
    )


def test_the_ignored_index_is_an_option() -> None:
    hidden, weight = randn(3, D, seed=0), randn(V, D, seed=1)
    loss = linear_cross_entropy_reference(hidden, weight, torch.tensor([3, 1, 3]), ignore_index=3)
    wanted = F.cross_entropy(hidden[1:2] @ weight.T, torch.tensor([1]))
    torch.testing.assert_close(loss, wanted)


def test_all_ignored_costs_nothing() -> None:
    nothing = torch.full((2, 4), -100)
    results = outputs_and_gradients(
        lambda hidden, weight: linear_cross_entropy_reference(hidden, weight, nothing),
        [randn(2, 4, D, seed=0), randn(V, D, seed=1)],
    )
    assert not any(result.any() for result in results)
