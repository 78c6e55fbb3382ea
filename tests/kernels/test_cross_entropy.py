import math
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fastllama_kernels.cross_entropy import (
    cached_programs,
    cross_entropy,
    cross_entropy_reference,
    scale_,
)
from tests.compare import (
    DEVICE,
    DTYPES,
    KERNEL_DTYPES,
    assert_as_exact_as,
    assert_operator_as_exact_as,
    assert_rounded_once,
    outputs_and_gradients,
    randn,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

N, V = 6, 11
TARGETS = torch.tensor([3, -100, 0, 10, -100, 3], device=DEVICE)
Reduction = Literal["none", "mean", "sum"]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_matches_pytorch(
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
def test_reference_applies_options_in_order(
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
        expected = (1 - label_smoothing) * (total - values[target])
        expected += label_smoothing * (total - sum(values) / V) + z_loss * total**2
        assert lse[row].item() == pytest.approx(total, rel=1e-14)
        assert losses[row].item() == pytest.approx(expected, rel=1e-13)


def test_reference_ignores_rows() -> None:
    logits = randn(N, V, seed=0)
    kept = TARGETS != -100

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy_reference(logits, targets, z_loss=0.01)[0]

    value, gradient = outputs_and_gradients(lambda x: loss(x, TARGETS), [logits])
    alone, expected = outputs_and_gradients(lambda x: loss(x, TARGETS[kept]), [logits[kept]])
    torch.testing.assert_close(value, alone, rtol=1e-14, atol=0)
    torch.testing.assert_close(gradient[kept], expected, rtol=1e-14, atol=0)
    assert not gradient[~kept].any()


def test_reference_ignore_index() -> None:
    logits, targets = randn(3, V, seed=0), torch.tensor([3, 1, 3], device=DEVICE)
    loss, _ = cross_entropy_reference(logits, targets, ignore_index=3)
    torch.testing.assert_close(loss, F.cross_entropy(logits[1:2], targets[1:2]))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_reference_all_ignored(reduction: Reduction) -> None:
    nothing = torch.full((N,), -100, device=DEVICE)
    loss, gradient = outputs_and_gradients(
        lambda x: cross_entropy_reference(x, nothing, z_loss=0.1, reduction=reduction)[0],
        [randn(N, V, seed=0)],
    )
    assert not loss.any()
    assert not gradient.any()


def test_reference_of_large_and_infinite_logits() -> None:
    # exp(1e4) overflows float64; -inf forbids a token id.
    logits = torch.tensor([[1e4, 1e4, -math.inf, -1e4]], dtype=torch.float64, device=DEVICE)
    targets = torch.tensor([1], device=DEVICE)
    loss, gradient = outputs_and_gradients(
        lambda x: cross_entropy_reference(x, targets, reduction="sum")[0], [logits]
    )
    # The loss is a difference of numbers near 1e4, which are rounded to 2e-12.
    assert loss.item() == pytest.approx(math.log(2), abs=4e-12)
    assert (gradient / gradient[0, 0]).tolist() == [pytest.approx([1, -1, 0, 0], rel=1e-11)]


# The kernels.


both_modes = pytest.mark.parametrize("inplace", [False, True])


def loss_of(
    operator: Callable[..., tuple[Tensor, Tensor]], targets: Tensor, **options: Any
) -> Callable[[Tensor], Tensor | tuple[Tensor, Tensor]]:
    """Bind targets and options; returns loss and lse, in place only the loss."""

    def loss(logits: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        # In place, the operator writes to its input; the `* 1` protects the leaf.
        outputs = operator(logits * 1, targets, **options)
        return outputs[0] if options.get("inplace") else outputs

    return loss


def assert_matches_reference(logits: Tensor, targets: Tensor, **options: Any) -> None:
    plain = loss_of(cross_entropy_reference, targets, **options)
    assert_operator_as_exact_as(loss_of(cross_entropy, targets, **options), plain, plain, [logits])


@both_modes
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_matches_reference(dtype: torch.dtype, reduction: Reduction, inplace: bool) -> None:
    logits = 3 * randn(N, V, seed=0, dtype=dtype)
    assert_matches_reference(logits, TARGETS, reduction=reduction, inplace=inplace)


@both_modes
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_options_together(
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    reduction: Reduction,
    inplace: bool,
) -> None:
    assert_matches_reference(
        3 * randn(4, V, seed=0, dtype=torch.float32),
        TARGETS[:4],
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        reduction=reduction,
        inplace=inplace,
    )


# The forward reads up to 16,384 logits at once, wider rows in blocks; the backward has blocks.
@both_modes
@pytest.mark.parametrize(
    "vocab_size",
    [1, 3, 127, 8_191, 8_193, 32_768, 32_769, 50_257, 65_537, 128_256, 151_936],
)
def test_any_vocabulary_size(vocab_size: int, inplace: bool) -> None:
    logits = 3 * randn(2, vocab_size, seed=0, dtype=torch.float32)
    logits[0, -1] = 12.0  # The last logit counts, target or not.
    targets = torch.tensor([0, vocab_size - 1], device=DEVICE)
    assert_matches_reference(logits, targets, z_loss=0.01, reduction="none", inplace=inplace)


@both_modes
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("vocab_size", [3, 127, 32_769])
def test_smoothing_stays_in_the_vocabulary(
    vocab_size: int, softcap: float | None, inplace: bool
) -> None:
    logits = 3 * randn(2, vocab_size, seed=0, dtype=torch.float32)
    targets = torch.tensor([0, vocab_size - 1], device=DEVICE)
    assert_matches_reference(
        logits, targets, label_smoothing=0.5, softcap=softcap, reduction="none", inplace=inplace
    )


@pytest.mark.parametrize("highest", [0, 32_768, 32_999])
def test_highest_logit_in_any_block(highest: int) -> None:
    logits = 3 * randn(1, 33_000, seed=0, dtype=torch.float32)
    logits[0, highest] = 200.0  # exp overflows if another maximum is subtracted.
    assert_matches_reference(logits, torch.tensor([17], device=DEVICE), label_smoothing=0.1)


@both_modes
def test_one_row(inplace: bool) -> None:
    assert_matches_reference(
        randn(1, V, seed=0, dtype=torch.float32), TARGETS[:1], z_loss=0.01, inplace=inplace
    )


@both_modes
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32])
def test_target_dtypes(dtype: torch.dtype, inplace: bool) -> None:
    logits = randn(N, V, seed=0, dtype=torch.float32)
    assert_matches_reference(logits, TARGETS.to(dtype), inplace=inplace)


def test_uint8_targets() -> None:
    logits = randn(2, 256, seed=0, dtype=torch.float32)
    tokens = torch.tensor([156, 3], device=DEVICE)
    loss, _ = cross_entropy(logits, tokens.byte())
    assert torch.equal(loss, cross_entropy(logits, tokens)[0])


# Ignored rows and targets outside the vocabulary.


@both_modes
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_all_ignored(ignore_index: int, reduction: Reduction, inplace: bool) -> None:
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


@both_modes
@pytest.mark.parametrize("ignore_index", [0, 3, V - 1, -1, 2**40])
def test_any_ignore_index(ignore_index: int, inplace: bool) -> None:
    targets = TARGETS.where(TARGETS != -100, ignore_index)
    logits = randn(N, V, seed=0, dtype=torch.float32)
    assert_matches_reference(
        logits, targets, ignore_index=ignore_index, label_smoothing=0.1, inplace=inplace
    )


@both_modes
def test_ignored_rows_are_zero(inplace: bool) -> None:
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


@both_modes
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_targets_outside_the_vocabulary_are_nan(dtype: torch.dtype, inplace: bool) -> None:
    def run(targets: list[int]) -> list[Tensor]:
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
    losses, gradient = run([3, V, -1, 2**40, -(2**40), 0])
    assert losses[1:5].isnan().all()
    assert gradient[1:5].isnan().all()
    expected_losses, expected_gradient = run([3, -100, -100, -100, -100, 0])
    assert torch.equal(losses[[0, 5]], expected_losses[[0, 5]])
    assert torch.equal(gradient[[0, 5]], expected_gradient[[0, 5]])


@both_modes
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_one_target_outside_the_vocabulary_makes_the_loss_nan(
    reduction: Reduction, inplace: bool
) -> None:
    targets = TARGETS.where(TARGETS != 10, V)
    logits = randn(N, V, seed=0, dtype=torch.float32)
    assert cross_entropy(logits, targets, reduction=reduction, inplace=inplace)[0].isnan()


# Rounding and range.


# Rounded to bfloat16 it is 1.0078, an error of half a unit in the last place.
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
def test_rounded_once(dtype: torch.dtype, vocab_size: int) -> None:
    logits = 3 * randn(2, vocab_size, seed=0, dtype=dtype)
    exact = scaled_gradient(cross_entropy_reference, logits.double(), AWKWARD)
    assert_rounded_once(scaled_gradient(cross_entropy, logits, AWKWARD), exact)
    exact = scaled_gradient(cross_entropy_reference, logits.double(), 1.0)
    assert_rounded_once(scaled_gradient(cross_entropy, logits, 1.0, inplace=True), exact)


def test_scale_is_not_rounded_to_the_dtype() -> None:
    # bfloat16 holds 171 and 173, but not their quotient.
    gradient = torch.full((2, V), 171.0, dtype=torch.bfloat16, device=DEVICE)
    scale_(gradient, torch.tensor(AWKWARD, device=DEVICE))
    assert gradient.unique().tolist() == [173.0]


@both_modes
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_gradient_of_confident_rows_does_not_cancel(dtype: torch.dtype, inplace: bool) -> None:
    # |p - 1| is at most 0.003; p rounded to bfloat16 is 1 or 1 - 0.004.
    logits = torch.zeros(4, V, dtype=dtype, device=DEVICE)
    logits.diagonal().copy_(torch.tensor([8.0, 9.0, 10.0, 12.0]))
    exact = scaled_gradient(cross_entropy_reference, logits.double(), 1.0)
    gradient = scaled_gradient(cross_entropy, logits, 1.0, inplace=inplace)
    assert_rounded_once(gradient, exact)
    assert gradient.diagonal().all()


@both_modes
@pytest.mark.parametrize("target", [0, 1, 2])
@pytest.mark.parametrize("size", [80.0, 1e4])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_large_logits(dtype: torch.dtype, size: float, target: int, inplace: bool) -> None:
    logits = torch.tensor([[size, -size, 0.0, size, 1.0]], dtype=dtype, device=DEVICE)
    assert_matches_reference(logits, torch.tensor([target], device=DEVICE), inplace=inplace)


@both_modes
@pytest.mark.parametrize("size", [20.0, 80.0])
def test_logits_around_the_softcap(size: float, inplace: bool) -> None:
    logits = torch.tensor([[size, -size, 0.0, size, 1.0]], device=DEVICE)
    targets = torch.tensor([1], device=DEVICE)
    assert_matches_reference(logits, targets, softcap=30.0, inplace=inplace)


@both_modes
def test_logits_far_above_the_softcap(inplace: bool) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0, 1e4, 1.0]], device=DEVICE)
    targets = torch.tensor([1], device=DEVICE)

    def loss(operator: Callable[..., Any], **options: Any) -> Any:
        return loss_of(operator, targets, softcap=30.0, **options)

    (found, *_, gradient), (true_loss, *_, truth) = (
        outputs_and_gradients(loss(cross_entropy, inplace=inplace), [logits]),
        outputs_and_gradients(loss(cross_entropy_reference, inplace=inplace), [logits.double()]),
    )
    assert_as_exact_as(found, true_loss.float(), true_loss)
    # The slope of the softcap is 0 at the large logits. The largest entry left is exp(-29), which
    # the kernel computes as exp2(-29 log2 e). The rounding of this argument is a relative error of
    # the result of about 30 * 2^-24.
    bound = (30 + 4) * 2**-24 * truth.abs().max()
    assert (gradient.double() - truth).abs().max() <= bound


SHIFTS = [0.0, 300.0, -300.0, 1e4]


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_reference_keeps_its_digits_wherever_the_logits_are(
    label_smoothing: float, shift: float
) -> None:
    logits = randn(4, 1_000, seed=0, dtype=torch.float32) + shift
    assert_as_exact_as_pytorch(cross_entropy_reference, logits, label_smoothing=label_smoothing)


@both_modes
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("vocab_size", [1_000, 20_000])
def test_kernels_keep_their_digits_wherever_the_logits_are(
    vocab_size: int, label_smoothing: float, shift: float, inplace: bool
) -> None:
    # exp(x - lse) would have the error of lse, 5e-4 near 1e4; the loss lse - x as well.
    logits = randn(4, vocab_size, seed=0, dtype=torch.float32) + shift
    assert_as_exact_as_pytorch(
        cross_entropy, logits, label_smoothing=label_smoothing, inplace=inplace
    )


def assert_as_exact_as_pytorch(
    operator: Callable[..., tuple[Tensor, Tensor]], logits: Tensor, **options: Any
) -> None:
    """Compare the loss and the gradient with those of F.cross_entropy."""
    targets = torch.arange(len(logits), device=DEVICE)
    plain = partial(F.cross_entropy, target=targets, label_smoothing=options["label_smoothing"])
    assert_operator_as_exact_as(
        lambda x: operator(x * 1, targets, **options)[0], plain, plain, [logits]
    )


@both_modes
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_infinite_logits(dtype: torch.dtype, softcap: float | None, inplace: bool) -> None:
    logits = randn(N, V, seed=0, dtype=dtype)
    logits[:, [1, 7]] = -math.inf
    assert_matches_reference(logits, TARGETS, softcap=softcap, z_loss=0.01, inplace=inplace)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NumPy's, in the interpreter.
@both_modes
@pytest.mark.parametrize("vocab_size", [V, 33_000])
def test_logit_of_infinity_is_no_loss(vocab_size: int, inplace: bool) -> None:
    logits = randn(2, vocab_size, seed=0, dtype=torch.float32)
    logits[0, 5] = math.inf
    targets = torch.tensor([5, 3], device=DEVICE)
    for operator in (cross_entropy, cross_entropy_reference):
        loss = loss_of(operator, targets, reduction="none", inplace=inplace)
        losses, *_, gradient = outputs_and_gradients(loss, [logits])
        assert losses.isnan().tolist() == [True, False]
        assert gradient.isnan().any(dim=1).tolist() == [True, False]


@both_modes
@pytest.mark.parametrize("allowed", [100, 32_900])
def test_whole_block_of_infinite_logits(allowed: int, inplace: bool) -> None:
    logits = torch.full((1, 33_000), -math.inf, device=DEVICE)
    logits[0, allowed : allowed + 10] = randn(10, seed=0, dtype=torch.float32)
    assert_matches_reference(logits, torch.tensor([allowed], device=DEVICE), inplace=inplace)


@both_modes
@pytest.mark.parametrize("softcap", [0.5, 30.0, 50.0, 300.0])
def test_softcap_far_above_the_logits(softcap: float, inplace: bool) -> None:
    logits = randn(N, V, seed=0, dtype=torch.float32)
    assert_matches_reference(logits, TARGETS, softcap=softcap, reduction="none", inplace=inplace)


@pytest.mark.parametrize(
    ("n_multiprocessors", "l2_mib", "row_bytes", "programs"),
    [
        (132, 50, 2 * 128_256, 102),  # H100: half of 50 MiB
        (108, 40, 2 * 128_256, 81),  # A100
        (148, 126, 2 * 128_256, 148),  # B200: one on each
        (132, 50, 4 * 256_000, 66),  # at least half of the multiprocessors
        (1, 0, 2 * 128_256, 1),  # Triton's interpreter
    ],
)
def test_rows_that_are_read_twice_fit_in_half_of_the_cache(
    n_multiprocessors: int, l2_mib: int, row_bytes: int, programs: int
) -> None:
    assert cached_programs(n_multiprocessors, l2_mib * 2**20, row_bytes) == programs


@pytest.mark.parametrize("n_rows", [1, 3, 7])
def test_programs_share_the_rows_that_are_read_twice(
    n_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without a cache half of the multiprocessors work: three programs.
    module = import_module("fastllama_kernels.cross_entropy")
    monkeypatch.setattr(module, "n_multiprocessors", lambda device: 6)
    logits = randn(n_rows, 20_000, seed=0, dtype=torch.float32)
    targets = torch.arange(n_rows, device=DEVICE)
    assert_matches_reference(logits, targets, reduction="none", inplace=True)


# In place.


def test_inplace_logits_become_the_gradient() -> None:
    logits = randn(N, V, seed=0, dtype=torch.float32).requires_grad_() * 1
    loss, _ = cross_entropy(logits, TARGETS, inplace=True)
    written = logits.detach().clone()
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.data_ptr() == logits.data_ptr()
    # With an upstream gradient of 1 the backward writes nothing.
    assert torch.equal(gradient, written)


def test_inplace_scales_each_row() -> None:
    logits = randn(N, V, seed=0, dtype=torch.float32).requires_grad_() * 1
    losses, _ = cross_entropy(logits, TARGETS, reduction="none", inplace=True)
    written = logits.detach().clone()
    scale = torch.tensor([1.0, 2.0, 0.0, -4.0, 1.0, 0.5], device=DEVICE)
    (gradient,) = torch.autograd.grad(losses, logits, scale)
    assert gradient.data_ptr() == logits.data_ptr()
    assert torch.equal(gradient, written * scale[:, None])


def test_inplace_lse_has_no_gradient() -> None:
    logits = 3 * randn(N, V, seed=0, dtype=torch.float32).requires_grad_()
    before = logits.detach().clone()
    _, lse = cross_entropy(logits, TARGETS, softcap=2.0, inplace=True)
    assert not lse.requires_grad
    _, plain = cross_entropy_reference(before, TARGETS, softcap=2.0)
    _, truth = cross_entropy_reference(before.double(), TARGETS, softcap=2.0)
    assert_as_exact_as(lse, plain, truth)


def test_inplace_after_another_use_of_the_logits() -> None:
    def loss_with(operator: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[Tensor], Tensor]:
        def loss(x: Tensor) -> Tensor:
            logits = x * 1
            total = logits.sum()
            return total + operator(logits, TARGETS, inplace=True)[0]

        return loss

    plain = loss_with(cross_entropy_reference)
    logits = randn(N, V, seed=0, dtype=torch.float32)
    assert_operator_as_exact_as(loss_with(cross_entropy), plain, plain, [logits])


@both_modes
def test_logits_of_a_matmul(inplace: bool) -> None:
    def loss_with(operator: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
        return lambda hidden, weight: operator(
            F.linear(hidden, weight).flatten(0, 1), TARGETS, inplace=inplace
        )[0]

    inputs = [randn(*shape, seed=0, dtype=torch.float32) for shape in ((2, 3, 5), (V, 5))]
    plain = loss_with(cross_entropy_reference)
    assert_operator_as_exact_as(loss_with(cross_entropy), plain, plain, inputs)


LOGITS = torch.zeros(2, 3)
LABELS = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("logits", "targets", "options", "message"),
    [
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
def test_wrong_arguments(
    logits: Tensor, targets: Tensor, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        cross_entropy(logits, targets, **options)


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
    assert_matches_reference(
        3 * randn(len(targets), vocab_size, seed=0, dtype=dtype),
        torch.tensor(targets, device=DEVICE).clamp(max=vocab_size - 1),
        ignore_index=-1,
        **options,
    )
