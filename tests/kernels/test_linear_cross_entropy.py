import itertools
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fastllama_kernels.cross_entropy import cross_entropy_reference
from fastllama_kernels.linear_cross_entropy import (
    chunk_length,
    linear_cross_entropy,
    linear_cross_entropy_cpu,
    linear_cross_entropy_fwd,
    linear_cross_entropy_reference,
)
from tests.compare import (
    DEVICE,
    DTYPES,
    KERNEL_DTYPES,
    assert_operator_as_exact_as,
    outputs_and_gradients,
    randn,
)
from tests.kernels.operator_cases import set_chunk_length

pytestmark = pytest.mark.usefixtures("poisoned_memory")

D, V = 16, 11
TARGETS = torch.tensor([[3, -100, 0, 10], [-100, 3, 7, 7]], device=DEVICE)


def matmul_then_cross_entropy(hidden: Tensor, weight: Tensor) -> Tensor:
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
def test_reference_matches_negative_log_likelihood(dtype: torch.dtype) -> None:
    inputs = [randn(2, 4, D, seed=0, dtype=dtype), randn(V, D, seed=1, dtype=dtype)]
    assert_operator_as_exact_as(
        lambda hidden, weight: linear_cross_entropy_reference(hidden, weight, TARGETS),
        matmul_then_cross_entropy,
        token_by_token,
        inputs,
    )


def test_reference_ignore_index() -> None:
    hidden, weight = randn(3, D, seed=0), randn(V, D, seed=1)
    targets = torch.tensor([3, 1, 3], device=DEVICE)
    loss = linear_cross_entropy_reference(hidden, weight, targets, ignore_index=3)
    expected = F.cross_entropy(hidden[1:2] @ weight.T, targets[1:2])
    torch.testing.assert_close(loss, expected)


def test_reference_all_ignored() -> None:
    nothing = torch.full((2, 4), -100, device=DEVICE)
    results = outputs_and_gradients(
        lambda hidden, weight: linear_cross_entropy_reference(hidden, weight, nothing),
        [randn(2, 4, D, seed=0), randn(V, D, seed=1)],
    )
    assert not any(result.any() for result in results)


OPTIONS = [
    {"label_smoothing": e, "z_loss": z, "softcap": c, "reduction": reduction}
    for e, z, c, reduction in itertools.product(
        (0.0, 0.1), (0.0, 0.01), (None, 2.0), ("mean", "sum")
    )
]


@pytest.mark.parametrize("options", OPTIONS)
def test_reference_options_match_cross_entropy(options: dict[str, Any]) -> None:
    def on_all_logits(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(hidden, weight).flatten(0, 1)
        return cross_entropy_reference(logits, TARGETS.flatten(), **options)[0]

    assert_operator_as_exact_as(
        lambda hidden, weight: linear_cross_entropy_reference(hidden, weight, TARGETS, **options),
        on_all_logits,
        on_all_logits,
        [randn(2, 4, D, seed=0), randn(V, D, seed=1)],
    )


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "operator", [linear_cross_entropy_reference, linear_cross_entropy_cpu, linear_cross_entropy]
)
def test_losses_of_all_rows(
    operator: Callable[..., Any],
    dtype: torch.dtype,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_chunk_length(3, monkeypatch)
    inputs = hidden_and_weight(dtype)
    alone = outputs_and_gradients(lambda *x: operator(*x, TARGETS, **options), inputs)
    found: list[Tensor] = []

    def with_losses(hidden: Tensor, weight: Tensor) -> Tensor:
        loss, losses = operator(hidden, weight, TARGETS, return_losses=True, **options)
        found.append(losses)
        return loss

    # Loss and gradients keep their bits.
    for one, other in zip(alone, outputs_and_gradients(with_losses, inputs), strict=True):
        assert torch.equal(one, other)
    assert not found[0].requires_grad
    assert found[0].shape == TARGETS.shape
    assert not found[0][TARGETS == -100].any()
    hidden, weight = (each.detach().double() for each in inputs)
    options = options | {"reduction": "sum"}
    for b, t in (TARGETS != -100).nonzero().tolist():
        expected = linear_cross_entropy_reference(
            hidden[b, t][None], weight, TARGETS[b, t][None], **options
        )
        # Logits below 16 in bfloat16 are off by at most 2^-5, and a loss by twice this.
        tolerance = 2**-4 if dtype == torch.bfloat16 else 1e-5
        assert found[0][b, t].item() == pytest.approx(expected.item(), abs=tolerance)


# For torch.compile on a CPU.


@pytest.mark.parametrize("length", [3, 512])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cpu_matches_reference(
    dtype: torch.dtype, options: dict[str, Any], length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_chunk_length(length, monkeypatch)
    assert_matches_reference(hidden_and_weight(dtype), TARGETS, linear_cross_entropy_cpu, **options)


@pytest.mark.parametrize("shift", [0.0, 1e2, 1e4])
def test_cpu_gradient_does_not_lose_digits_to_large_logits(shift: float) -> None:
    # With the identity as weight the logits are the inputs, to the bit.
    logits = randn(2, 4, V, seed=0, dtype=torch.float32) + shift
    inputs = [logits, torch.eye(V, device=DEVICE)]
    exact = [x.double() for x in inputs]
    _, found, _ = outputs_and_gradients(lambda *x: linear_cross_entropy_cpu(*x, TARGETS), inputs)
    _, truth, _ = outputs_and_gradients(
        lambda *x: linear_cross_entropy_reference(*x, TARGETS), exact
    )
    # A few roundings of float32. exp(x - lse) would add those of lse, 5e-4 at 1e4.
    assert (found.double() - truth).norm() <= 1e-6 * truth.norm()


def test_cpu_sums_chunks_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    # A bfloat16 sum stalls at 256 times the gradient of a row.
    set_chunk_length(1, monkeypatch)
    hidden, weight = hidden_and_weight(torch.bfloat16, tokens=(1,))
    targets = torch.zeros(600, dtype=torch.int64, device=DEVICE)

    def weight_gradient(n: int) -> Tensor:
        leaf = weight.detach().requires_grad_()
        linear_cross_entropy_cpu(hidden.expand(n, D), leaf, targets[:n], reduction="sum").backward()
        assert leaf.grad is not None
        return leaf.grad.float()

    # Only the last rounding to bfloat16 is left.
    torch.testing.assert_close(weight_gradient(600), 600 * weight_gradient(1), rtol=2**-8, atol=0)


def test_cpu_without_valid_targets() -> None:
    nothing = torch.full((2, 4), -100, device=DEVICE)
    results = outputs_and_gradients(
        lambda hidden, weight: linear_cross_entropy_cpu(hidden, weight, nothing),
        hidden_and_weight(),
    )
    assert not any(result.any() for result in results)


# The kernels.


def hidden_and_weight(
    dtype: torch.dtype = torch.float32, tokens: tuple[int, ...] = (2, 4)
) -> list[Tensor]:
    return [randn(*tokens, D, seed=0, dtype=dtype), randn(V, D, seed=1, dtype=dtype)]


def assert_matches_reference(
    inputs: list[Tensor],
    targets: Tensor,
    operator: Callable[..., Tensor] = linear_cross_entropy,
    **options: Any,
) -> None:
    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy_reference(hidden, weight, targets, **options)

    assert_operator_as_exact_as(
        lambda hidden, weight: operator(hidden, weight, targets, **options),
        plain,
        plain,
        inputs,
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_matches_reference(dtype: torch.dtype, reduction: str) -> None:
    assert_matches_reference(hidden_and_weight(dtype), TARGETS, reduction=reduction)


@pytest.mark.parametrize("options", OPTIONS)
def test_options_together(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    set_chunk_length(3, monkeypatch)
    assert_matches_reference(hidden_and_weight(), TARGETS, **options)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 9])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_any_chunk_length(dtype: torch.dtype, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    set_chunk_length(length, monkeypatch)
    assert_matches_reference(hidden_and_weight(dtype), TARGETS, z_loss=0.01)


def test_chunk_length() -> None:
    assert chunk_length(10**6, 32_768, 2) == 8_192
    # Exactly 1 GiB.
    assert chunk_length(10**6, 2**16, 2) == 8_192
    assert chunk_length(10**6, 2**16 + 1, 2) == 4_096
    # A chunk may have a gibibyte of logits and no more.
    assert chunk_length(10**6, 2**17, 2) == 4_096
    assert chunk_length(10**6, 2**17 + 1, 2) == 2_048
    assert chunk_length(10**6, 2**16 + 1, 4) == 2_048
    assert chunk_length(1_000, 2**17 + 1, 2) == 1_000
    assert chunk_length(3_000, 2**17 + 1, 2) == 2_048


@pytest.mark.parametrize("vocab_size", [1, 3, 127, 8_193, 32_769, 50_257])
def test_any_vocabulary_size(vocab_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    set_chunk_length(2, monkeypatch)
    inputs = [randn(*shape, seed=0, dtype=torch.float32) for shape in ((3, 4), (vocab_size, 4))]
    targets = torch.tensor([0, vocab_size // 2, vocab_size - 1], device=DEVICE)
    assert_matches_reference(inputs, targets, label_smoothing=0.5)


@pytest.mark.parametrize("tokens", [(1,), (1, 1), (2, 2, 2)])
def test_any_leading_dimensions(tokens: tuple[int, ...]) -> None:
    targets = TARGETS.flatten()[: math.prod(tokens)].view(tokens)
    assert_matches_reference(hidden_and_weight(tokens=tokens), targets)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
def test_target_dtypes(dtype: torch.dtype) -> None:
    assert_matches_reference(hidden_and_weight(), TARGETS.to(dtype))


def test_uint8_targets() -> None:
    inputs = [randn(*shape, seed=0, dtype=torch.float32) for shape in ((2, D), (256, D))]
    tokens = torch.tensor([156, 3], device=DEVICE)
    loss = linear_cross_entropy(*inputs, tokens.byte())
    assert torch.equal(loss, linear_cross_entropy(*inputs, tokens))


# Ignored tokens and targets outside the vocabulary.


@pytest.mark.parametrize("length", [3, 8])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_all_ignored(
    dtype: torch.dtype, reduction: str, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_chunk_length(length, monkeypatch)
    nothing = torch.full((2, 4), -100, device=DEVICE)
    results = outputs_and_gradients(
        lambda hidden, weight: linear_cross_entropy(
            hidden, weight, nothing, label_smoothing=0.1, z_loss=0.1, reduction=reduction
        ),
        hidden_and_weight(dtype),
    )
    assert not any(x.any() for x in results)


@pytest.mark.parametrize("ignored", [slice(0, 2), slice(2, 4), slice(6, 8), slice(0, 6)])
def test_all_of_a_chunk_ignored(ignored: slice, monkeypatch: pytest.MonkeyPatch) -> None:
    set_chunk_length(2, monkeypatch)
    targets = torch.arange(8, device=DEVICE)
    targets[ignored] = -100
    assert_matches_reference(hidden_and_weight(tokens=(8,)), targets)


@pytest.mark.parametrize("ignore_index", [0, 3, V - 1, -1])
def test_any_ignore_index(ignore_index: int) -> None:
    targets = TARGETS.where(TARGETS != -100, ignore_index)
    assert_matches_reference(hidden_and_weight(), targets, ignore_index=ignore_index)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_targets_outside_the_vocabulary_are_nan(
    reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(targets: list[int]) -> list[Tensor]:
        return outputs_and_gradients(
            lambda hidden, weight: linear_cross_entropy(
                hidden, weight, torch.tensor(targets, device=DEVICE), reduction=reduction
            ),
            hidden_and_weight(tokens=(5,)),
        )

    set_chunk_length(2, monkeypatch)
    loss, dhidden, dweight = run([3, V, -1, 2**40, 0])
    assert loss.isnan()
    assert dhidden[1:4].isnan().all()
    # Every token contributes to every row of the weight's gradient.
    assert dweight.isnan().all()
    _, expected, _ = run([3, 4, 4, 4, 0])
    assert torch.equal(dhidden[[0, 4]], expected[[0, 4]])


# Rounding and range.


def test_chunks_are_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    # These logits are exact, so they do not depend on the chunk length.
    n_tokens = 64
    signs = torch.randn(n_tokens, 4, generator=torch.Generator().manual_seed(0)).sign()
    hidden = (0.5 + signs / 4).to(DEVICE, torch.bfloat16)
    weight = (randn(5, 4, seed=1).round() / 2).bfloat16()
    targets = torch.zeros(n_tokens, dtype=torch.int64, device=DEVICE)

    def dweight(length: int) -> Tensor:
        set_chunk_length(length, monkeypatch)
        options = (-100, 0.0, 0.0, 0.0, True, True)
        gradient: Tensor = linear_cross_entropy_fwd(hidden, weight, targets, *options)[2]
        return gradient

    together, apart = dweight(n_tokens), dweight(1)
    assert apart.dtype == torch.float32
    # 64 sums, each rounded to float32; rounding to bfloat16 would be 65,536 times as large.
    atol = 64 * torch.finfo(torch.float32).eps * together.abs().max().item()
    torch.testing.assert_close(apart, together, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_gradient_of_confident_tokens_does_not_cancel(dtype: torch.dtype) -> None:
    # |p - 1| is at most 0.003; p rounded to bfloat16 is 1 or 1 - 0.004.
    hidden = torch.tensor([8.0, 9.0, 10.0, 12.0], device=DEVICE).diag_embed().to(dtype)
    weight = torch.eye(V, 4, dtype=dtype, device=DEVICE)
    assert_matches_reference([hidden, weight], torch.arange(4, device=DEVICE), reduction="sum")


@pytest.mark.parametrize("target", [0, 1, 2])
@pytest.mark.parametrize("size", [80.0, 1e4])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_large_logits(dtype: torch.dtype, size: float, target: int) -> None:
    hidden = torch.tensor([[size, 1.0]], device=DEVICE).to(dtype)
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [0.0, 1.0]], device=DEVICE)
    assert_matches_reference([hidden, weight.to(dtype)], torch.tensor([target], device=DEVICE))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_scale_is_not_rounded_to_the_dtype(dtype: torch.dtype) -> None:
    hidden, weight = leaves = [x.requires_grad_() for x in hidden_and_weight(dtype)]
    loss = linear_cross_entropy(hidden, weight, TARGETS, reduction="sum")
    # Rounded to bfloat16 it is 1.0078, an error of half a unit in the last place.
    scale = torch.tensor(173 / 171, device=DEVICE)
    unscaled = torch.autograd.grad(loss, leaves, retain_graph=True)
    dhidden, dweight = torch.autograd.grad(loss, leaves, scale)
    assert torch.equal(dhidden, (unscaled[0].float() * scale).to(dtype))
    _, _, exact = linear_cross_entropy_fwd(
        hidden.detach().flatten(0, 1), weight.detach(), TARGETS.flatten(), -100, 0, 0, 0, True, True
    )
    assert torch.equal(dweight, (exact * scale).to(dtype))


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Sizes of the gradients of hidden and weight, one pair for each forward of the test."""
    sizes = []

    def launch(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        results: tuple[Tensor, Tensor, Tensor] = linear_cross_entropy_fwd(*arguments)
        sizes.append(tuple(x.numel() for x in results[1:]))
        return results

    module = sys.modules["fastllama_kernels.linear_cross_entropy"]
    monkeypatch.setattr(module, "_KERNELS", module._KERNELS._replace(fwd=launch))
    return sizes


@pytest.mark.parametrize(
    ("frozen", "sizes"), [(0, (0, V * D)), (1, (8 * D, 0))], ids=["hidden", "weight"]
)
def test_no_gradient_of_frozen_inputs_is_computed(
    frozen: int,
    sizes: tuple[int, int],
    computed: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_chunk_length(3, monkeypatch)
    leaves = [x.requires_grad_() for x in hidden_and_weight()]
    expected = torch.autograd.grad(linear_cross_entropy(*leaves, TARGETS), leaves)
    leaves[frozen].requires_grad_(False)
    linear_cross_entropy(*leaves, TARGETS).backward()
    assert leaves[frozen].grad is None
    gradient = leaves[1 - frozen].grad
    assert gradient is not None
    assert torch.equal(gradient, expected[1 - frozen])
    assert computed == [(8 * D, V * D), sizes]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_gradient_is_computed_without_grad(
    mode: Callable[[], torch.no_grad],
    computed: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_chunk_length(3, monkeypatch)
    leaves = [x.requires_grad_() for x in hidden_and_weight()]
    expected = linear_cross_entropy(*leaves, TARGETS)
    with mode():
        loss = linear_cross_entropy(*leaves, TARGETS)
    assert torch.equal(loss, expected)
    assert not loss.requires_grad
    assert computed == [(8 * D, V * D), (0, 0)]


@pytest.mark.parametrize(
    "dtypes",
    list(itertools.product((torch.float32, torch.bfloat16), repeat=2)),
    ids=lambda dtypes: "-".join(str(x).removeprefix("torch.") for x in dtypes),
)
def test_autocast_of_mixed_dtypes(
    dtypes: tuple[torch.dtype, torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    def under_autocast(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def loss(hidden: Tensor, weight: Tensor) -> Tensor:
            with torch.autocast(DEVICE, torch.bfloat16):
                return operator(hidden, weight, TARGETS)

        return loss

    set_chunk_length(3, monkeypatch)
    inputs = [
        x.to(dtype) for x, dtype in zip(hidden_and_weight(torch.bfloat16), dtypes, strict=True)
    ]
    assert_operator_as_exact_as(
        under_autocast(linear_cross_entropy),
        under_autocast(linear_cross_entropy_reference),
        lambda hidden, weight: linear_cross_entropy_reference(hidden, weight, TARGETS),
        inputs,
        computed_in=torch.bfloat16,
    )


HIDDEN, WEIGHT = torch.zeros(2, 4, D), torch.zeros(V, D)
LABELS = torch.zeros(2, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("hidden", "weight", "targets", "options", "message"),
    [
        (HIDDEN, WEIGHT.bfloat16(), LABELS, {}, "hidden is torch.float32 and weight torch.bfloat"),
        (HIDDEN.bfloat16(), WEIGHT, LABELS, {}, "hidden is torch.bfloat16 and weight torch.float"),
        (HIDDEN, WEIGHT[:, 1:], LABELS, {}, r"weight has shape \(11, 15\), and needs \(V, 16\)"),
        (HIDDEN, WEIGHT[0], LABELS, {}, r"weight has shape \(16,\)"),
        (HIDDEN, WEIGHT, LABELS[:1], {}, r"targets have shape \(1, 4\), and need \(2, 4\)"),
        (HIDDEN, WEIGHT, LABELS.flatten(), {}, r"targets have shape \(8,\), and need \(2, 4\)"),
        (HIDDEN, WEIGHT, LABELS.to("meta"), {}, "targets are on meta and hidden on cpu"),
        (HIDDEN, WEIGHT, LABELS, {"softcap": 0.0}, "softcap is 0.0; it has to be above 0"),
        (HIDDEN, WEIGHT, LABELS, {"reduction": "none"}, "reduction is none"),
        (HIDDEN, WEIGHT, LABELS, {"main_grad": torch.zeros(D, V).T}, r"strides \(1, 11\)"),
    ],
)
def test_wrong_arguments(
    hidden: Tensor, weight: Tensor, targets: Tensor, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(hidden, weight, targets, **options)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    targets=st.lists(st.integers(-1, 39), min_size=1, max_size=6),
    vocab_size=st.integers(2, 40),
    width=st.integers(1, 9),
    length=st.integers(1, 7),
    dtype=st.sampled_from(KERNEL_DTYPES),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    z_loss=st.sampled_from([0.0, 0.01]),
    softcap=st.sampled_from([None, 2.0]),
    reduction=st.sampled_from(["mean", "sum"]),
)
def test_any_shape_and_option(
    targets: list[int], vocab_size: int, width: int, length: int, dtype: torch.dtype, **options: Any
) -> None:
    shapes = ((len(targets), width), (vocab_size, width))
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_chunk_length(length, monkeypatch)
        assert_matches_reference(
            [randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)],
            torch.tensor(targets, device=DEVICE).clamp(max=vocab_size - 1),
            ignore_index=-1,
            **options,
        )


# On a GPU.


@pytest.mark.gpu
def test_peak_memory() -> None:
    n_tokens, width, vocab_size = 32_768, 256, 32_768
    hidden = torch.randn(n_tokens, width, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocab_size, width, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.arange(n_tokens, device=DEVICE)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_cross_entropy(hidden, weight, targets).backward()
    # The logits and their gradient in float32.
    unchunked = 2 * 4 * n_tokens * vocab_size
    assert torch.cuda.max_memory_allocated() - before <= unchunked / 8


@pytest.mark.gpu
def test_more_logits_than_int32(monkeypatch: pytest.MonkeyPatch) -> None:
    n_tokens, width, vocab_size = 65_538, 8, 32_768
    set_chunk_length(n_tokens, monkeypatch)
    hidden = torch.randn(n_tokens, width, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(vocab_size, width, device=DEVICE, dtype=torch.bfloat16)
    # Only the last tokens count; the offsets of their logits exceed int32.
    targets = torch.full((n_tokens,), -100, device=DEVICE)
    targets[-2:] = torch.tensor([0, vocab_size - 1], device=DEVICE)

    def last_alone(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy_reference(hidden[-2:], weight, targets[-2:])

    assert_operator_as_exact_as(
        lambda hidden, weight: linear_cross_entropy(hidden, weight, targets),
        last_alone,
        last_alone,
        [hidden, weight],
    )
