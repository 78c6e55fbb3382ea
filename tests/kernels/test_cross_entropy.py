import math
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastllama_kernels.cross_entropy import cross_entropy_reference
from tests.compare import DTYPES, assert_operator_as_exact_as, outputs_and_gradients, randn

N, V = 6, 11
TARGETS = torch.tensor([3, -100, 0, 10, -100, 3])
Reduction = Literal["none", "mean", "sum"]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_is_that_of_pytorch(
    dtype: torch.dtype, label_smoothing: float, reduction: Reduction
) -> None:
    def plain(logits: Tensor) -> Tensor:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(wide, TARGETS, label_smoothing=label_smoothing, reduction=reduction)

    assert_operator_as_exact_as(
        lambda logits: cross_entropy_reference(
            logits, TARGETS, label_smoothing=label_smoothing, reduction=reduction
        )[0],
        plain,
        plain,
        [3 * randn(N, V, seed=0, dtype=dtype)],
    )


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_options_apply_in_the_documented_order(
    label_smoothing: float, z_loss: float, softcap: float | None
) -> None:
    logits = 3 * randn(N, V, seed=0)
    losses, lse = cross_entropy_reference(
        logits,
        TARGETS,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        reduction="none",
    )
    for row, target in enumerate(TARGETS.tolist()):
        if target == -100:
            assert losses[row] == 0
            continue
        values = logits[row].tolist()
        if softcap is not None:
            values = [softcap * math.tanh(x / softcap) for x in values]
        total = math.log(sum(math.exp(x) for x in values))
        wanted = (1 - label_smoothing) * (total - values[target])
        wanted += label_smoothing * (total - sum(values) / V) + z_loss * total**2
        assert lse[row].item() == pytest.approx(total, rel=1e-14)
        assert losses[row].item() == pytest.approx(wanted, rel=1e-13)


def test_gradients_are_the_slopes() -> None:
    def everything(logits: Tensor) -> tuple[Tensor, Tensor]:
        return cross_entropy_reference(
            logits, TARGETS, label_smoothing=0.2, z_loss=0.01, softcap=2.0
        )

    assert torch.autograd.gradcheck(everything, [randn(N, V, seed=0).requires_grad_()])


def test_ignored_rows_change_nothing() -> None:
    logits = randn(N, V, seed=0)
    kept = TARGETS != -100

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy_reference(logits, targets, z_loss=0.01)[0]

    value, gradient = outputs_and_gradients(lambda x: loss(x, TARGETS), [logits])
    alone, wanted = outputs_and_gradients(lambda x: loss(x, TARGETS[kept]), [logits[kept]])
    torch.testing.assert_close(value, alone, rtol=1e-14, atol=0)
    torch.testing.assert_close(gradient[kept], wanted, rtol=1e-14, atol=0)
    assert not gradient[~kept].any()


def test_any_index_can_be_the_ignored_one() -> None:
    logits, targets = randn(3, V, seed=0), torch.tensor([3, 1, 3])
    loss, _ = cross_entropy_reference(logits, targets, ignore_index=3)
    torch.testing.assert_close(loss, F.cross_entropy(logits[1:2], targets[1:2]))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_all_ignored_costs_nothing(reduction: Reduction) -> None:
    nothing = torch.full((N,), -100)
    loss, gradient = outputs_and_gradients(
        lambda x: cross_entropy_reference(x, nothing, z_loss=0.1, reduction=reduction)[0],
        [randn(N, V, seed=0)],
    )
    assert not loss.any()
    assert not gradient.any()


def test_large_and_forbidden_logits_stay_finite() -> None:
    # exp(1e4) overflows even float64; an id that may not occur has the logit -inf.
    logits = torch.tensor([[1e4, 1e4, -math.inf, -1e4]], dtype=torch.float64)
    loss, gradient = outputs_and_gradients(
        lambda x: cross_entropy_reference(x, torch.tensor([1]), reduction="sum")[0], [logits]
    )
    # The loss is the difference of numbers near 1e4, whose last place is 2e-12.
    assert loss.item() == pytest.approx(math.log(2), abs=4e-12)
    assert (gradient / gradient[0, 0]).tolist() == [pytest.approx([1, -1, 0, 0], rel=1e-11)]
