import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fastllama_kernels.cross_entropy import cross_entropy, cross_entropy_reference, scale_
from tests.compare import (
    DEVICE,
    DTYPES,
    KERNEL_DTYPES,
    assert_as_exact_as,
    assert_operator_as_exact_as,
    outputs_and_gradients,
    randn,
)

N, V = 6, 11
TARGETS = torch.tensor([3, -100, 0, 10, -100, 3], device=DEVICE)
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
    logits, targets = randn(3, V, seed=0), torch.tensor([3, 1, 3], device=DEVICE)
    loss, _ = cross_entropy_reference(logits, targets, ignore_index=3)
    torch.testing.assert_close(loss, F.cross_entropy(logits[1:2], targets[1:2]))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_all_ignored_costs_nothing(reduction: Reduction) -> None:
    nothing = torch.full((N,), -100, device=DEVICE)
    loss, gradient = outputs_and_gradients(
        lambda x: cross_entropy_reference(x, nothing, z_loss=0.1, reduction=reduction)[0],
        [randn(N, V, seed=0)],
    )
    assert not loss.any()
    assert not gradient.any()


def test_large_and_forbidden_logits_stay_finite() -> None:
    # exp(1e4) overflows even float64; an id that may not occur has the logit -inf.
    logits = torch.tensor([[1e4, 1e4, -math.inf, -1e4]], dtype=torch.float64, device=DEVICE)
    targets = torch.tensor([1], device=DEVICE)
    loss, gradient = outputs_and_gradients(
        lambda x: cross_entropy_reference(x, targets, reduction="sum")[0], [logits]
    )
    # The loss is the difference of numbers near 1e4, whose last place is 2e-12.
    assert loss.item() == pytest.approx(math.log(2), abs=4e-12)
    assert (gradient / gradient[0, 0]).tolist() == [pytest.approx([1, -1, 0, 0], rel=1e-11)]


# From here on the kernels.

IN_BOTH_MODES = pytest.mark.parametrize("inplace", [False, True])


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def loss_of(
    operator: Callable[..., tuple[Tensor, Tensor]], targets: Tensor, **options: Any
) -> Callable[[Tensor], Tensor | tuple[Tensor, Tensor]]:
    """The operator as a function of the logits: loss and lse, or with `inplace` the loss alone."""

    def loss(logits: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        # Times 1, because `inplace` writes into what it is given, and a leaf has to survive.
        outputs = operator(logits * 1, targets, **options)
        return outputs[0] if options.get("inplace") else outputs

    return loss


def assert_is_the_reference(logits: Tensor, targets: Tensor, **options: Any) -> None:
    plain = loss_of(cross_entropy_reference, targets, **options)
    assert_operator_as_exact_as(loss_of(cross_entropy, targets, **options), plain, plain, [logits])


@IN_BOTH_MODES
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_is_the_reference(dtype: torch.dtype, reduction: Reduction, inplace: bool) -> None:
    logits = 3 * randn(N, V, seed=0, dtype=dtype)
    assert_is_the_reference(logits, TARGETS, reduction=reduction, inplace=inplace)


@IN_BOTH_MODES
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_options_go_together(
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    reduction: Reduction,
    inplace: bool,
) -> None:
    assert_is_the_reference(
        3 * randn(4, V, seed=0, dtype=torch.float32),
        TARGETS[:4],
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        reduction=reduction,
        inplace=inplace,
    )


# Up to 32,768 a row is read once, beyond by blocks; the backward takes blocks of 4,096.
@IN_BOTH_MODES
@pytest.mark.parametrize(
    "vocab_size",
    [1, 3, 127, 8_191, 8_193, 32_768, 32_769, 50_257, 65_537, 128_256, 151_936],
)
def test_vocabulary_of_any_size(vocab_size: int, inplace: bool) -> None:
    logits = 3 * randn(2, vocab_size, seed=0, dtype=torch.float32)
    logits[0, -1] = 12.0  # The last entry counts where it is not the target too.
    targets = torch.tensor([0, vocab_size - 1], device=DEVICE)
    assert_is_the_reference(logits, targets, z_loss=0.01, reduction="none", inplace=inplace)


@IN_BOTH_MODES
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("vocab_size", [3, 127, 32_769])
def test_no_entry_past_the_vocabulary_is_smoothed(
    vocab_size: int, softcap: float | None, inplace: bool
) -> None:
    logits = 3 * randn(2, vocab_size, seed=0, dtype=torch.float32)
    targets = torch.tensor([0, vocab_size - 1], device=DEVICE)
    assert_is_the_reference(
        logits, targets, label_smoothing=0.5, softcap=softcap, reduction="none", inplace=inplace
    )


@pytest.mark.parametrize("highest", [0, 32_768, 32_999])
def test_the_highest_logit_may_be_in_any_block(highest: int) -> None:
    logits = 3 * randn(1, 33_000, seed=0, dtype=torch.float32)
    logits[0, highest] = 200.0  # From there exp overflows where another maximum is subtracted.
    assert_is_the_reference(logits, torch.tensor([17], device=DEVICE), label_smoothing=0.1)


@IN_BOTH_MODES
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_no_rows(reduction: Reduction, inplace: bool) -> None:
    nothing = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    loss, *_, gradient = outputs_and_gradients(
        loss_of(cross_entropy, nothing, reduction=reduction, inplace=inplace),
        [randn(0, V, seed=0, dtype=torch.float32)],
    )
    assert loss.shape == ((0,) if reduction == "none" else ())
    assert not loss.any()
    assert gradient.shape == (0, V)


@IN_BOTH_MODES
def test_one_row(inplace: bool) -> None:
    assert_is_the_reference(
        randn(1, V, seed=0, dtype=torch.float32), TARGETS[:1], z_loss=0.01, inplace=inplace
    )


# Where the logits and the targets lie.


@pytest.mark.parametrize(
    ("lay_out", "shape"),
    [
        pytest.param(lambda x: x.mT, (V, N), id="transposed"),
        pytest.param(lambda x: x[:, 1:-2], (N, V + 3), id="sliced"),
        pytest.param(lambda x: x[::2], (2 * N, V), id="every-other-row"),
        pytest.param(lambda x: x.expand(N, V), (1, V), id="one-for-all-rows"),
    ],
)
def test_strided_logits(lay_out: Callable[[Tensor], Tensor], shape: tuple[int, int]) -> None:
    def by(operator: Callable[..., tuple[Tensor, Tensor]]) -> Any:
        return lambda x: operator(lay_out(x), TARGETS, z_loss=0.01)

    x = randn(*shape, seed=0, dtype=torch.float32)
    assert not lay_out(x).is_contiguous()
    plain = by(cross_entropy_reference)
    assert_operator_as_exact_as(by(cross_entropy), plain, plain, [x])


@IN_BOTH_MODES
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_misaligned_logits_after_aligned(dtype: torch.dtype, inplace: bool) -> None:
    for start in (0, 1):

        def by(
            operator: Callable[..., tuple[Tensor, Tensor]], start: int = start
        ) -> Callable[[Tensor], Tensor]:
            return lambda x: operator(
                (x * 1)[start : start + N * V].view(N, V), TARGETS, inplace=inplace
            )[0]

        plain = by(cross_entropy_reference)
        numbers = randn(N * V + 1, seed=0, dtype=dtype)
        assert_operator_as_exact_as(by(cross_entropy), plain, plain, [numbers])


@IN_BOTH_MODES
def test_misaligned_targets_after_aligned(inplace: bool) -> None:
    # The targets of a sequence are its tokens from the second on.
    tokens = torch.tensor([10, *TARGETS.tolist()], device=DEVICE)
    logits = randn(N, V, seed=0, dtype=torch.float32)
    for targets in (tokens[:-1], tokens[1:], torch.stack((tokens, tokens), dim=1)[1:, 0]):
        assert_is_the_reference(logits, targets, inplace=inplace)


@IN_BOTH_MODES
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32])
def test_narrow_targets(dtype: torch.dtype, inplace: bool) -> None:
    logits = randn(N, V, seed=0, dtype=torch.float32)
    assert_is_the_reference(logits, TARGETS.to(dtype), inplace=inplace)


def test_a_byte_may_be_any_token() -> None:
    logits = randn(2, 256, seed=0, dtype=torch.float32)
    tokens = torch.tensor([156, 3], device=DEVICE)
    loss, _ = cross_entropy(logits, tokens.byte())
    assert torch.equal(loss, cross_entropy(logits, tokens)[0])


# Which rows count.


@IN_BOTH_MODES
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_all_ignored_is_exactly_nothing(
    ignore_index: int, reduction: Reduction, inplace: bool
) -> None:
    loss, gradient = outputs_and_gradients(
        lambda x: cross_entropy(
            x * 1,
            torch.full((N,), ignore_index, device=DEVICE),
            ignore_index=ignore_index,
            label_smoothing=0.1,
            z_loss=0.1,
            reduction=reduction,
            inplace=inplace,
        )[0],
        [randn(N, V, seed=0, dtype=torch.float32)],
    )
    assert not loss.any()
    assert not gradient.any()


@IN_BOTH_MODES
@pytest.mark.parametrize("ignore_index", [0, 3, V - 1, -1, 2**40])
def test_any_index_is_ignored_when_told_so(ignore_index: int, inplace: bool) -> None:
    targets = TARGETS.where(TARGETS != -100, ignore_index)
    logits = randn(N, V, seed=0, dtype=torch.float32)
    assert_is_the_reference(
        logits, targets, ignore_index=ignore_index, label_smoothing=0.1, inplace=inplace
    )


@IN_BOTH_MODES
def test_ignored_rows_are_written_as_zeros(inplace: bool) -> None:
    losses, gradient = outputs_and_gradients(
        lambda x: cross_entropy(
            x * 1, TARGETS, label_smoothing=0.1, z_loss=0.1, reduction="none", inplace=inplace
        )[0],
        [randn(N, V, seed=0, dtype=torch.bfloat16)],
    )
    ignored = TARGETS == -100
    assert not losses[ignored].any()
    assert not gradient[ignored].any()
    assert losses[~ignored].all()
    assert gradient[~ignored].any(dim=-1).all()


def test_ignored_rows_have_an_lse_with_a_gradient() -> None:
    def lse(operator: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[Tensor], Tensor]:
        return lambda x: operator(x, TARGETS)[1]

    plain = lse(cross_entropy_reference)
    logits = randn(N, V, seed=0, dtype=torch.float32)
    assert_operator_as_exact_as(lse(cross_entropy), plain, plain, [logits])


@IN_BOTH_MODES
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_targets_outside_the_vocabulary_are_nan_alone(dtype: torch.dtype, inplace: bool) -> None:
    def by(targets: list[int]) -> list[Tensor]:
        return outputs_and_gradients(
            lambda x: cross_entropy(
                x * 1,
                torch.tensor(targets, device=DEVICE),
                label_smoothing=0.1,
                reduction="none",
                inplace=inplace,
            )[0],
            [logits],
        )

    logits = randn(N, V, seed=0, dtype=dtype)
    losses, gradient = by([3, V, -1, 2**40, -(2**40), 0])
    assert losses[1:5].isnan().all()
    assert gradient[1:5].isnan().all()
    wanted_losses, wanted_gradient = by([3, -100, -100, -100, -100, 0])
    assert torch.equal(losses[[0, 5]], wanted_losses[[0, 5]])
    assert torch.equal(gradient[[0, 5]], wanted_gradient[[0, 5]])


@IN_BOTH_MODES
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_one_target_outside_the_vocabulary_spoils_the_loss(
    reduction: Reduction, inplace: bool
) -> None:
    targets = TARGETS.where(TARGETS != 10, V)
    logits = randn(N, V, seed=0, dtype=torch.float32)
    assert cross_entropy(logits, targets, reduction=reduction, inplace=inplace)[0].isnan()


# How exact it is.


def assert_rounded_once(actual: Tensor, exact: Tensor) -> None:
    """Each entry is one of the two neighbours of float32 arithmetic on numbers of magnitude 1.

    Neither has to be the nearest: Triton's interpreter cuts bfloat16 off, a GPU rounds it.
    """
    info = torch.finfo(actual.dtype)
    _, exponent = torch.frexp(exact)
    unit = torch.ldexp(torch.full_like(exact, info.eps), exponent - 1)
    unit = unit.clamp(min=info.smallest_normal * info.eps)
    slack = 4 * torch.finfo(torch.float32).eps
    assert ((actual.double() - exact).abs() <= unit + slack).all()


# bfloat16 has 1.0078 for it: half a unit in the last place too little, or all of one.
AWKWARD = torch.tensor(173 / 171).item()


def scaled_gradient(
    operator: Callable[..., tuple[Tensor, Tensor]], logits: Tensor, scale: float, **options: Any
) -> Tensor:
    logits = logits.detach().requires_grad_()
    targets = torch.arange(len(logits), device=DEVICE)
    losses, _ = operator(logits * 1, targets, reduction="none", **options)
    (gradient,) = torch.autograd.grad(losses, logits, torch.full_like(losses, scale))
    return gradient


@pytest.mark.parametrize("vocab_size", [V, 32_769])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_width_gradients_are_rounded_once(dtype: torch.dtype, vocab_size: int) -> None:
    logits = 3 * randn(2, vocab_size, seed=0, dtype=dtype)
    exact = scaled_gradient(cross_entropy_reference, logits.double(), AWKWARD)
    assert_rounded_once(scaled_gradient(cross_entropy, logits, AWKWARD), exact)
    exact = scaled_gradient(cross_entropy_reference, logits.double(), 1.0)
    assert_rounded_once(scaled_gradient(cross_entropy, logits, 1.0, inplace=True), exact)


def test_the_scale_of_a_gradient_is_not_rounded_to_its_type() -> None:
    # 171 and 173 are numbers of bfloat16 whose quotient is none.
    gradient = torch.full((2, V), 171.0, dtype=torch.bfloat16, device=DEVICE)
    scale_(gradient, torch.tensor(AWKWARD, device=DEVICE))
    assert gradient.unique().tolist() == [173.0]


@IN_BOTH_MODES
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_gradients_of_confident_rows_do_not_cancel(dtype: torch.dtype, inplace: bool) -> None:
    # p - 1 is -0.003 and less; rounded to bfloat16, p is 1 or 1 - 0.004.
    logits = torch.zeros(4, V, dtype=dtype, device=DEVICE)
    logits.diagonal().copy_(torch.tensor([8.0, 9.0, 10.0, 12.0]))
    exact = scaled_gradient(cross_entropy_reference, logits.double(), 1.0)
    gradient = scaled_gradient(cross_entropy, logits, 1.0, inplace=inplace)
    assert_rounded_once(gradient, exact)
    assert gradient.diagonal().all()


@IN_BOTH_MODES
@pytest.mark.parametrize("target", [0, 1, 2])
@pytest.mark.parametrize("size", [80.0, 1e4])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_large_logits(dtype: torch.dtype, size: float, target: int, inplace: bool) -> None:
    logits = torch.tensor([[size, -size, 0.0, size, 1.0]], dtype=dtype, device=DEVICE)
    assert_is_the_reference(logits, torch.tensor([target], device=DEVICE), inplace=inplace)


@IN_BOTH_MODES
@pytest.mark.parametrize("size", [20.0, 80.0, 1e4])
def test_logits_around_and_above_the_cap(size: float, inplace: bool) -> None:
    logits = torch.tensor([[size, -size, 0.0, size, 1.0]], device=DEVICE)
    targets = torch.tensor([1], device=DEVICE)
    assert_is_the_reference(logits, targets, softcap=30.0, inplace=inplace)


@IN_BOTH_MODES
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_forbidden_ids(dtype: torch.dtype, softcap: float | None, inplace: bool) -> None:
    logits = randn(N, V, seed=0, dtype=dtype)
    logits[:, [1, 7]] = -math.inf
    assert_is_the_reference(logits, TARGETS, softcap=softcap, z_loss=0.01, inplace=inplace)


@IN_BOTH_MODES
@pytest.mark.parametrize("allowed", [100, 32_900])
def test_a_whole_block_of_forbidden_ids(allowed: int, inplace: bool) -> None:
    logits = torch.full((1, 33_000), -math.inf, device=DEVICE)
    logits[0, allowed : allowed + 10] = randn(10, seed=0, dtype=torch.float32)
    assert_is_the_reference(logits, torch.tensor([allowed], device=DEVICE), inplace=inplace)


@IN_BOTH_MODES
@pytest.mark.parametrize("softcap", [0.5, 30.0, 50.0, 300.0])
def test_a_cap_far_above_the_logits_costs_no_digits(softcap: float, inplace: bool) -> None:
    logits = randn(N, V, seed=0, dtype=torch.float32)
    assert_is_the_reference(logits, TARGETS, softcap=softcap, reduction="none", inplace=inplace)


# What comes from above.


@IN_BOTH_MODES
@pytest.mark.parametrize("scale", [0.37, 1_024.0, -3.0])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_a_scaled_loss_has_a_scaled_gradient(
    dtype: torch.dtype, scale: float, inplace: bool
) -> None:
    def by(operator: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[Tensor], Tensor]:
        return lambda x: operator(x * 1, TARGETS, inplace=inplace)[0] * scale

    plain = by(cross_entropy_reference)
    logits = randn(N, V, seed=0, dtype=dtype)
    assert_operator_as_exact_as(by(cross_entropy), plain, plain, [logits])


@IN_BOTH_MODES
def test_a_loss_times_0_has_no_gradient(inplace: bool) -> None:
    logits = randn(N, V, seed=0, dtype=torch.float32).requires_grad_()
    loss, _ = cross_entropy(logits * 1, TARGETS, inplace=inplace)
    (gradient,) = torch.autograd.grad(loss * 0, logits)
    assert not gradient.any()


@IN_BOTH_MODES
@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_one_gradient_from_above_for_all_rows(scale: float, inplace: bool) -> None:
    logits = randn(N, V, seed=0, dtype=torch.float32).requires_grad_()
    gradients = []
    for upstream in (torch.tensor(scale, device=DEVICE).expand(N), torch.full((N,), scale)):
        losses, _ = cross_entropy(logits * 1, TARGETS, reduction="none", inplace=inplace)
        gradients += torch.autograd.grad(losses, logits, upstream.to(DEVICE))
    assert torch.equal(*gradients)


def test_one_gradient_from_above_for_every_lse() -> None:
    logits = randn(N, V, seed=0, dtype=torch.float32).requires_grad_()
    _, lse = cross_entropy(logits, TARGETS)
    (expanded,) = torch.autograd.grad(lse.sum(), logits, retain_graph=True)
    (dense,) = torch.autograd.grad(lse, logits, torch.ones_like(lse))
    assert torch.equal(expanded, dense)


# What happens to the memory.


def test_the_logits_are_left_alone() -> None:
    logits = randn(N, V, seed=0, dtype=torch.float32).requires_grad_()
    before, targets = logits.detach().clone(), TARGETS.clone()
    loss, _ = cross_entropy(logits, targets, z_loss=0.01)
    loss.backward()
    assert torch.equal(logits, before)
    assert torch.equal(targets, TARGETS)
    assert logits._version == 0


def test_logits_handed_over_become_the_gradient() -> None:
    logits = randn(N, V, seed=0, dtype=torch.float32).requires_grad_() * 1
    loss, _ = cross_entropy(logits, TARGETS, inplace=True)
    written = logits.detach().clone()
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.data_ptr() == logits.data_ptr()
    # Nothing is left for a backward from 1 to do.
    assert torch.equal(gradient, written)


def test_rows_are_scaled_one_by_one_in_place() -> None:
    logits = randn(N, V, seed=0, dtype=torch.float32).requires_grad_() * 1
    losses, _ = cross_entropy(logits, TARGETS, reduction="none", inplace=True)
    written = logits.detach().clone()
    scale = torch.tensor([1.0, 2.0, 0.0, -4.0, 1.0, 0.5], device=DEVICE)
    (gradient,) = torch.autograd.grad(losses, logits, scale)
    assert gradient.data_ptr() == logits.data_ptr()
    assert torch.equal(gradient, written * scale[:, None])


def test_the_lse_of_logits_handed_over_is_a_number() -> None:
    logits = 3 * randn(N, V, seed=0, dtype=torch.float32).requires_grad_()
    before = logits.detach().clone()
    _, lse = cross_entropy(logits, TARGETS, softcap=2.0, inplace=True)
    assert not lse.requires_grad
    _, plain = cross_entropy_reference(before, TARGETS, softcap=2.0)
    _, truth = cross_entropy_reference(before.double(), TARGETS, softcap=2.0)
    assert_as_exact_as(lse, plain, truth)


def test_a_dispatch_mode_may_keep_logits_handed_over() -> None:
    # As selective checkpointing does, to hand them out again.
    logits = randn(N, V, seed=0, dtype=torch.float32).requires_grad_()
    with FlopCounterMode(display=False):
        loss, _ = cross_entropy(logits, TARGETS, inplace=True)
        (gradient,) = torch.autograd.grad(loss, logits)
    assert logits._version == 0
    assert gradient.data_ptr() != logits.data_ptr()


@pytest.mark.parametrize(
    ("operator", "written"), [("cross_entropy_gradient_fwd_", "logits"), ("scale_", "x")]
)
def test_mutations_are_declared(operator: str, written: str) -> None:
    arguments = getattr(torch.ops.fastllama, operator).default._schema.arguments
    assert [x.name for x in arguments if x.alias_info and x.alias_info.is_write] == [written]


def test_who_saved_its_output_is_told_that_it_changed() -> None:
    x = randn(N, V, seed=0, dtype=torch.float32).requires_grad_()
    loss, _ = cross_entropy(torch.exp(x), TARGETS, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_who_saved_the_logits_is_told_that_they_changed() -> None:
    logits = randn(N, V, seed=0, dtype=torch.float32).requires_grad_() * 1
    penalty = logits.square().mean()
    loss, _ = cross_entropy(logits, TARGETS, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + penalty).backward()


def test_who_used_the_logits_before_adds_its_gradient() -> None:
    def by(operator: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[Tensor], Tensor]:
        def loss(x: Tensor) -> Tensor:
            logits = x * 1
            total = logits.sum()
            return total + operator(logits, TARGETS, inplace=True)[0]

        return loss

    plain = by(cross_entropy_reference)
    logits = randn(N, V, seed=0, dtype=torch.float32)
    assert_operator_as_exact_as(by(cross_entropy), plain, plain, [logits])


@IN_BOTH_MODES
def test_behind_a_projection(inplace: bool) -> None:
    def by(operator: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
        return lambda hidden, weight: operator(
            F.linear(hidden, weight).flatten(0, 1), TARGETS, inplace=inplace
        )[0]

    inputs = [randn(*shape, seed=0, dtype=torch.float32) for shape in ((2, 3, 5), (V, 5))]
    plain = by(cross_entropy_reference)
    assert_operator_as_exact_as(by(cross_entropy), plain, plain, inputs)


# How it sits in autograd.


def test_a_second_backward_gives_the_same_bits() -> None:
    logits = randn(N, V, seed=0, dtype=torch.bfloat16).requires_grad_()
    loss, lse = cross_entropy(logits, TARGETS)
    total = 0.37 * loss + lse.sum()
    (first,) = torch.autograd.grad(total, logits, retain_graph=True)
    first = first.clone()
    assert torch.equal(torch.autograd.grad(total, logits)[0], first)


@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_a_second_backward_over_logits_handed_over_is_an_error(scale: float) -> None:
    logits = randn(N, V, seed=0, dtype=torch.float32).requires_grad_()
    loss, _ = cross_entropy(logits * 1, TARGETS, inplace=True)
    (scale * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (scale * loss).backward()


@IN_BOTH_MODES
def test_a_second_run_gives_the_same_bits(inplace: bool) -> None:
    logits = randn(2, 32_769, seed=0, dtype=torch.bfloat16)
    function = loss_of(cross_entropy, TARGETS[:2], z_loss=0.01, inplace=inplace)
    first, second = (outputs_and_gradients(function, [logits]) for _ in range(2))
    assert all(map(torch.equal, first, second))


@IN_BOTH_MODES
def test_a_gradient_of_the_gradient_is_an_error(inplace: bool) -> None:
    logits = randn(N, V, seed=0, dtype=torch.float32).requires_grad_()
    loss, _ = cross_entropy(logits * 1, TARGETS, inplace=inplace)
    (gradient,) = torch.autograd.grad(loss.square(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@IN_BOTH_MODES
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Callable[[], torch.no_grad], inplace: bool) -> None:
    logits = randn(N, V, seed=0, dtype=torch.float32).requires_grad_()
    wanted = cross_entropy(logits * 1, TARGETS, inplace=inplace)
    with mode():
        results = cross_entropy(logits * 1, TARGETS, inplace=inplace)
    assert all(map(torch.equal, results, wanted))
    assert not any(x.requires_grad for x in results)


@IN_BOTH_MODES
def test_frozen_logits_make_no_graph(inplace: bool) -> None:
    logits = randn(N, V, seed=0, dtype=torch.float32)
    loss, lse = cross_entropy(logits, TARGETS, inplace=inplace)
    assert not loss.requires_grad
    assert not lse.requires_grad


@IN_BOTH_MODES
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_autocast_changes_nothing(dtype: torch.dtype, inplace: bool) -> None:
    logits = randn(N, V, seed=0, dtype=dtype)
    function = loss_of(cross_entropy, TARGETS, inplace=inplace)
    wanted = outputs_and_gradients(function, [logits])
    with torch.autocast(DEVICE, torch.bfloat16):
        results = outputs_and_gradients(function, [logits])
    assert all(map(torch.equal, results, wanted))
    assert [x.dtype for x in results] == [torch.float32] * (len(results) - 1) + [dtype]


LOGITS = torch.zeros(2, 3)
LABELS = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("logits", "targets", "options", "message"),
    [
        (LOGITS.double(), LABELS, {}, "logits is torch.float64"),
        (LOGITS[0], LABELS, {}, r"logits have shape \(3,\) and targets \(2,\)"),
        (LOGITS, LABELS[:1], {}, r"logits have shape \(2, 3\) and targets \(1,\)"),
        (LOGITS, LABELS[None], {}, r"targets \(1, 2\); they need \(N, V\) and \(N,\)"),
        (LOGITS, LABELS.to("meta"), {}, "targets are on meta and logits on cpu"),
        (LOGITS, LABELS, {"softcap": 0.0}, "softcap is 0.0; it has to be above 0"),
        (LOGITS, LABELS, {"softcap": -1.0}, "softcap is -1.0"),
        (LOGITS.mT.contiguous().mT, LABELS, {"inplace": True}, "inplace needs contiguous logits"),
        (LOGITS, LABELS, {"reduction": "average"}, "reduction is average"),
    ],
)
def test_mistakes_are_explained(
    logits: Tensor, targets: Tensor, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        cross_entropy(logits, targets, **options)


@IN_BOTH_MODES
def test_off_the_gpu_is_explained(monkeypatch: pytest.MonkeyPatch, inplace: bool) -> None:
    monkeypatch.setattr("fastllama_kernels._library.INTERPRETED", False)
    with pytest.raises(ValueError, match="needs tensors on a CUDA device, not on cpu"):
        cross_entropy(LOGITS, LABELS, inplace=inplace)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    targets=st.lists(st.integers(-1, 39), min_size=1, max_size=5),
    vocab_size=st.integers(2, 40),
    dtype=st.sampled_from(KERNEL_DTYPES),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    z_loss=st.sampled_from([0.0, 0.01]),
    softcap=st.sampled_from([None, 2.0, 30.0]),
    reduction=st.sampled_from(["none", "mean", "sum"]),
    inplace=st.booleans(),
)
def test_any_shape_and_option(
    targets: list[int], vocab_size: int, dtype: torch.dtype, **options: Any
) -> None:
    assert_is_the_reference(
        3 * randn(len(targets), vocab_size, seed=0, dtype=dtype),
        torch.tensor(targets, device=DEVICE).clamp(max=vocab_size - 1),
        ignore_index=-1,
        **options,
    )


# What only a GPU can show.


@pytest.mark.gpu
@IN_BOTH_MODES
def test_more_entries_than_int32_counts(inplace: bool) -> None:
    vocab_size = 32_768
    n_rows = 2**31 // vocab_size + 2
    generator = torch.Generator(DEVICE).manual_seed(0)
    shape = (n_rows, vocab_size)
    logits = torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.bfloat16)
    last = logits[-2:].clone()
    targets = torch.arange(n_rows, device=DEVICE) % vocab_size
    logits.requires_grad_()
    losses, _ = cross_entropy(logits, targets, reduction="none", inplace=inplace)
    (gradient,) = torch.autograd.grad(losses, logits, torch.ones_like(losses))

    def of_last(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = last.to(dtype, copy=True).requires_grad_()
        losses, _ = cross_entropy_reference(leaf, targets[-2:], reduction="none")
        return losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]

    results = (losses[-2:].detach(), gradient[-2:])
    plain, truth = of_last(torch.bfloat16), of_last(torch.float64)
    for actual, ordinary, exact in zip(results, plain, truth, strict=True):
        assert_as_exact_as(actual, ordinary, exact)


def forward_and_backward(inplace: bool) -> Callable[[], list[Tensor]]:
    logits = randn(N, V, seed=0, dtype=torch.bfloat16).requires_grad_()

    def step() -> list[Tensor]:
        loss, lse = cross_entropy(logits * 1, TARGETS, z_loss=0.01, inplace=inplace)
        return [loss, lse, *torch.autograd.grad(loss * 0.37, logits)]

    return step


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@IN_BOTH_MODES
def test_never_waits_for_the_gpu(inplace: bool) -> None:
    step = forward_and_backward(inplace)
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@IN_BOTH_MODES
def test_a_cuda_graph_replays_it(inplace: bool) -> None:
    step = forward_and_backward(inplace)
    wanted = step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    graph.replay()
    assert all(map(torch.equal, results, wanted))
