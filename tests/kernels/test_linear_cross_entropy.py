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

D, V = 16, 11
TARGETS = torch.tensor([[3, -100, 0, 10], [-100, 3, 7, 7]], device=DEVICE)


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
    targets = torch.tensor([3, 1, 3], device=DEVICE)
    loss = linear_cross_entropy_reference(hidden, weight, targets, ignore_index=3)
    wanted = F.cross_entropy(hidden[1:2] @ weight.T, targets[1:2])
    torch.testing.assert_close(loss, wanted)


def test_all_ignored_costs_nothing() -> None:
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
def test_options_are_those_of_cross_entropy(options: dict[str, Any]) -> None:
    def on_all_logits(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(hidden, weight).flatten(0, 1)
        return cross_entropy_reference(logits, TARGETS.flatten(), **options)[0]

    assert_operator_as_exact_as(
        lambda hidden, weight: linear_cross_entropy_reference(hidden, weight, TARGETS, **options),
        on_all_logits,
        on_all_logits,
        [randn(2, 4, D, seed=0), randn(V, D, seed=1)],
    )


# From here on the kernels.


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def in_chunks_of(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["fastllama_kernels.linear_cross_entropy"]
    monkeypatch.setattr(module, "chunk_length", lambda n_tokens, *_: length)


def some(dtype: torch.dtype = torch.float32, tokens: tuple[int, ...] = (2, 4)) -> list[Tensor]:
    return [randn(*tokens, D, seed=0, dtype=dtype), randn(V, D, seed=1, dtype=dtype)]


def assert_is_the_reference(inputs: list[Tensor], targets: Tensor, **options: Any) -> None:
    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy_reference(hidden, weight, targets, **options)

    assert_operator_as_exact_as(
        lambda hidden, weight: linear_cross_entropy(hidden, weight, targets, **options),
        plain,
        plain,
        inputs,
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_is_the_reference(dtype: torch.dtype, reduction: str) -> None:
    assert_is_the_reference(some(dtype), TARGETS, reduction=reduction)


@pytest.mark.parametrize("options", OPTIONS)
def test_options_go_together(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    in_chunks_of(3, monkeypatch)
    assert_is_the_reference(some(), TARGETS, **options)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 9])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_chunks_of_any_length(
    dtype: torch.dtype, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_chunks_of(length, monkeypatch)
    assert_is_the_reference(some(dtype), TARGETS, z_loss=0.01)


def test_chunks_are_of_4096_tokens_or_half_of_it() -> None:
    assert chunk_length(10**6, 32_768, 2) == 4_096
    # A gibibyte of logits is not too much, an entry more is.
    assert chunk_length(10**6, 2**17, 2) == 4_096
    assert chunk_length(10**6, 2**17 + 1, 2) == 2_048
    assert chunk_length(10**6, 2**16 + 1, 4) == 2_048
    assert chunk_length(1_000, 2**17 + 1, 2) == 1_000
    assert chunk_length(3_000, 2**17 + 1, 2) == 2_048


@pytest.mark.parametrize("vocab_size", [1, 3, 127, 8_193, 32_769, 50_257])
def test_vocabulary_of_any_size(vocab_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    in_chunks_of(2, monkeypatch)
    inputs = [randn(*shape, seed=0, dtype=torch.float32) for shape in ((3, 4), (vocab_size, 4))]
    targets = torch.tensor([0, vocab_size // 2, vocab_size - 1], device=DEVICE)
    assert_is_the_reference(inputs, targets, label_smoothing=0.5)


@pytest.mark.parametrize("tokens", [(0,), (2, 0)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_tokens(reduction: str, tokens: tuple[int, ...]) -> None:
    nothing = torch.zeros(tokens, dtype=torch.int64, device=DEVICE)
    loss, dhidden, dweight = outputs_and_gradients(
        lambda hidden, weight: linear_cross_entropy(hidden, weight, nothing, reduction=reduction),
        some(tokens=tokens),
    )
    assert loss == 0
    assert dhidden.shape == (*tokens, D)
    assert not dweight.any()


@pytest.mark.parametrize("tokens", [(1,), (1, 1), (2, 2, 2)])
def test_tokens_of_any_dimensions(tokens: tuple[int, ...]) -> None:
    targets = TARGETS.flatten()[: math.prod(tokens)].view(tokens)
    assert_is_the_reference(some(tokens=tokens), targets)


# Where the inputs lie.


@pytest.mark.parametrize(
    ("lay_out", "shapes"),
    [
        pytest.param(lambda x, w: (x.transpose(0, 1), w), [(4, 2, D), (V, D)], id="time-first"),
        pytest.param(lambda x, w: (x[..., 1:-2], w), [(2, 4, D + 3), (V, D)], id="sliced-hidden"),
        pytest.param(lambda x, w: (x.expand(2, 4, D), w), [(1, 1, D), (V, D)], id="one-hidden"),
        pytest.param(lambda x, w: (x, w.mT), [(2, 4, D), (D, V)], id="transposed-weight"),
        pytest.param(lambda x, w: (x, w[1:, 2:]), [(2, 4, D), (V + 1, D + 2)], id="sliced-weight"),
    ],
)
def test_strided_inputs(
    lay_out: Callable[..., tuple[Tensor, Tensor]],
    shapes: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_chunks_of(3, monkeypatch)

    def by(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda hidden, weight: operator(*lay_out(hidden, weight), TARGETS)

    inputs = [randn(*shape, seed=i, dtype=torch.float32) for i, shape in enumerate(shapes)]
    plain = by(linear_cross_entropy_reference)
    assert_operator_as_exact_as(by(linear_cross_entropy), plain, plain, inputs)


def test_misaligned_targets_after_aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    # Chunks of 3 begin at targets of any alignment too.
    in_chunks_of(3, monkeypatch)
    tokens = torch.tensor([10, *TARGETS.flatten().tolist()], device=DEVICE)
    for targets in (tokens[:-1], tokens[1:]):
        assert_is_the_reference(some(tokens=(8,)), targets)
    tokens = torch.cat((TARGETS, TARGETS), dim=1)
    for targets in (tokens[:, :4], tokens[:, 1:5]):
        assert_is_the_reference(some(), targets)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
def test_narrow_targets(dtype: torch.dtype) -> None:
    assert_is_the_reference(some(), TARGETS.to(dtype))


def test_a_byte_may_be_any_token() -> None:
    inputs = [randn(*shape, seed=0, dtype=torch.float32) for shape in ((2, D), (256, D))]
    tokens = torch.tensor([156, 3], device=DEVICE)
    loss = linear_cross_entropy(*inputs, tokens.byte())
    assert torch.equal(loss, linear_cross_entropy(*inputs, tokens))


# Which tokens count.


@pytest.mark.parametrize("length", [3, 8])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_all_ignored_is_exactly_nothing(
    dtype: torch.dtype, reduction: str, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_chunks_of(length, monkeypatch)
    nothing = torch.full((2, 4), -100, device=DEVICE)
    results = outputs_and_gradients(
        lambda hidden, weight: linear_cross_entropy(
            hidden, weight, nothing, label_smoothing=0.1, z_loss=0.1, reduction=reduction
        ),
        some(dtype),
    )
    assert not any(x.any() for x in results)


@pytest.mark.parametrize("ignored", [slice(0, 2), slice(2, 4), slice(6, 8), slice(0, 6)])
def test_whole_chunks_may_be_ignored(ignored: slice, monkeypatch: pytest.MonkeyPatch) -> None:
    in_chunks_of(2, monkeypatch)
    targets = torch.arange(8, device=DEVICE)
    targets[ignored] = -100
    assert_is_the_reference(some(tokens=(8,)), targets)


@pytest.mark.parametrize("ignore_index", [0, 3, V - 1, -1])
def test_any_index_is_ignored_when_told_so(ignore_index: int) -> None:
    targets = TARGETS.where(TARGETS != -100, ignore_index)
    assert_is_the_reference(some(), targets, ignore_index=ignore_index)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_target_outside_the_vocabulary_is_nan(
    reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def by(targets: list[int]) -> list[Tensor]:
        return outputs_and_gradients(
            lambda hidden, weight: linear_cross_entropy(
                hidden, weight, torch.tensor(targets, device=DEVICE), reduction=reduction
            ),
            some(tokens=(5,)),
        )

    in_chunks_of(2, monkeypatch)
    loss, dhidden, dweight = by([3, V, -1, 2**40, 0])
    assert loss.isnan()
    assert dhidden[1:4].isnan().all()
    # The weight, all of it, sees every token.
    assert dweight.isnan().all()
    _, wanted, _ = by([3, 4, 4, 4, 0])
    assert torch.equal(dhidden[[0, 4]], wanted[[0, 4]])


# How exact it is.


def test_many_chunks_are_added_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    # Logits of a few binary digits are the same in chunks of any length.
    n_tokens = 64
    signs = torch.randn(n_tokens, 4, generator=torch.Generator().manual_seed(0)).sign()
    hidden = (0.5 + signs / 4).to(DEVICE, torch.bfloat16)
    weight = (randn(5, 4, seed=1).round() / 2).bfloat16()
    targets = torch.zeros(n_tokens, dtype=torch.int64, device=DEVICE)

    def dweight(length: int) -> Tensor:
        in_chunks_of(length, monkeypatch)
        options = (-100, 0.0, 0.0, 0.0, True, True)
        gradient: Tensor = linear_cross_entropy_fwd(hidden, weight, targets, *options)[2]
        return gradient

    together, apart = dweight(n_tokens), dweight(1)
    assert apart.dtype == torch.float32
    # 64 sums, none above the last, each rounded to float32: bfloat16 would be 65,536 times that.
    atol = 64 * torch.finfo(torch.float32).eps * together.abs().max().item()
    torch.testing.assert_close(apart, together, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_gradients_of_confident_tokens_do_not_cancel(dtype: torch.dtype) -> None:
    # p - 1 is -0.003 and less; rounded to bfloat16, p is 1 or 1 - 0.004.
    hidden = torch.tensor([8.0, 9.0, 10.0, 12.0], device=DEVICE).diag_embed().to(dtype)
    weight = torch.eye(V, 4, dtype=dtype, device=DEVICE)
    assert_is_the_reference([hidden, weight], torch.arange(4, device=DEVICE), reduction="sum")


@pytest.mark.parametrize("target", [0, 1, 2])
@pytest.mark.parametrize("size", [80.0, 1e4])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_large_logits(dtype: torch.dtype, size: float, target: int) -> None:
    hidden = torch.tensor([[size, 1.0]], device=DEVICE).to(dtype)
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [0.0, 1.0]], device=DEVICE)
    assert_is_the_reference([hidden, weight.to(dtype)], torch.tensor([target], device=DEVICE))


# What comes from above.


@pytest.mark.parametrize("scale", [0.37, 1_024.0, -3.0])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_a_scaled_loss_has_a_scaled_gradient(dtype: torch.dtype, scale: float) -> None:
    def by(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda hidden, weight: scale * operator(hidden, weight, TARGETS)

    plain = by(linear_cross_entropy_reference)
    assert_operator_as_exact_as(by(linear_cross_entropy), plain, plain, some(dtype))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_the_scale_of_a_gradient_is_not_rounded_to_its_type(dtype: torch.dtype) -> None:
    hidden, weight = leaves = [x.requires_grad_() for x in some(dtype)]
    loss = linear_cross_entropy(hidden, weight, TARGETS, reduction="sum")
    # bfloat16 has 1.0078 for it: half a unit in the last place too little, or all of one.
    scale = torch.tensor(173 / 171, device=DEVICE)
    unscaled = torch.autograd.grad(loss, leaves, retain_graph=True)
    dhidden, dweight = torch.autograd.grad(loss, leaves, scale)
    assert torch.equal(dhidden, (unscaled[0].float() * scale).to(dtype))
    _, _, exact = linear_cross_entropy_fwd(
        hidden.detach().flatten(0, 1), weight.detach(), TARGETS.flatten(), -100, 0, 0, 0, True, True
    )
    assert torch.equal(dweight, (exact * scale).to(dtype))


def test_a_loss_times_0_has_no_gradient() -> None:
    leaves = [x.requires_grad_() for x in some()]
    loss = linear_cross_entropy(*leaves, TARGETS)
    assert not any(x.any() for x in torch.autograd.grad(loss * 0, leaves))


# How it sits in autograd.


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_the_inputs_are_left_alone(dtype: torch.dtype) -> None:
    hidden, weight = (x.requires_grad_() for x in some(dtype))
    before = [x.detach().clone() for x in (hidden, weight, TARGETS)]
    linear_cross_entropy(hidden, weight, TARGETS, label_smoothing=0.1).backward()
    assert all(map(torch.equal, (hidden, weight, TARGETS), before))
    assert (hidden._version, weight._version) == (0, 0)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_a_second_backward_gives_the_same_bits(dtype: torch.dtype) -> None:
    leaves = [x.requires_grad_() for x in some(dtype)]
    loss = 0.37 * linear_cross_entropy(*leaves, TARGETS)
    first = [x.clone() for x in torch.autograd.grad(loss, leaves, retain_graph=True)]
    assert all(map(torch.equal, torch.autograd.grad(loss, leaves), first))


def test_a_second_run_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    in_chunks_of(3, monkeypatch)
    first, second = (
        outputs_and_gradients(
            lambda hidden, weight: linear_cross_entropy(hidden, weight, TARGETS),
            some(torch.bfloat16),
        )
        for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


def test_a_gradient_of_the_gradient_is_an_error() -> None:
    leaves = [x.requires_grad_() for x in some()]
    loss = linear_cross_entropy(*leaves, TARGETS)
    dhidden, _ = torch.autograd.grad(loss.square(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dhidden.sum().backward()


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Sizes of the gradients of hidden and weight that the forwards of a test compute."""
    sizes = []

    def launch(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        results: tuple[Tensor, Tensor, Tensor] = linear_cross_entropy_fwd(*arguments)
        sizes.append(tuple(x.numel() for x in results[1:]))
        return results

    module = sys.modules["fastllama_kernels.linear_cross_entropy"]
    monkeypatch.setattr(module, "linear_cross_entropy_fwd", launch)
    return sizes


@pytest.mark.parametrize(
    ("frozen", "sizes"), [(0, (0, V * D)), (1, (8 * D, 0))], ids=["hidden", "weight"]
)
def test_what_is_frozen_has_no_gradient(
    frozen: int,
    sizes: tuple[int, int],
    computed: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_chunks_of(3, monkeypatch)
    leaves = [x.requires_grad_() for x in some()]
    wanted = torch.autograd.grad(linear_cross_entropy(*leaves, TARGETS), leaves)
    leaves[frozen].requires_grad_(False)
    linear_cross_entropy(*leaves, TARGETS).backward()
    assert leaves[frozen].grad is None
    gradient = leaves[1 - frozen].grad
    assert gradient is not None
    assert torch.equal(gradient, wanted[1 - frozen])
    assert computed == [(8 * D, V * D), sizes]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_none_is_computed(
    mode: Callable[[], torch.no_grad],
    computed: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_chunks_of(3, monkeypatch)
    leaves = [x.requires_grad_() for x in some()]
    wanted = linear_cross_entropy(*leaves, TARGETS)
    with mode():
        loss = linear_cross_entropy(*leaves, TARGETS)
    assert torch.equal(loss, wanted)
    assert not loss.requires_grad
    assert computed == [(8 * D, V * D), (0, 0)]


@pytest.mark.parametrize(
    "dtypes",
    list(itertools.product((torch.float32, torch.bfloat16), repeat=2)),
    ids=lambda dtypes: "-".join(str(x).removeprefix("torch.") for x in dtypes),
)
def test_autocast_multiplies_in_bfloat16(
    dtypes: tuple[torch.dtype, torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    def under_autocast(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def loss(hidden: Tensor, weight: Tensor) -> Tensor:
            with torch.autocast(DEVICE, torch.bfloat16):
                return operator(hidden, weight, TARGETS)

        return loss

    in_chunks_of(3, monkeypatch)
    inputs = [x.to(dtype) for x, dtype in zip(some(torch.bfloat16), dtypes, strict=True)]
    assert_operator_as_exact_as(
        under_autocast(linear_cross_entropy),
        under_autocast(linear_cross_entropy_reference),
        lambda hidden, weight: linear_cross_entropy_reference(hidden, weight, TARGETS),
        inputs,
    )


HIDDEN, WEIGHT = torch.zeros(2, 4, D), torch.zeros(V, D)
LABELS = torch.zeros(2, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("hidden", "weight", "targets", "options", "message"),
    [
        (HIDDEN.double(), WEIGHT.double(), LABELS, {}, "hidden is torch.float64"),
        (HIDDEN, WEIGHT.bfloat16(), LABELS, {}, "hidden is torch.float32 and weight torch.bfloat"),
        (HIDDEN.bfloat16(), WEIGHT, LABELS, {}, "hidden is torch.bfloat16 and weight torch.float"),
        (HIDDEN, WEIGHT[:, 1:], LABELS, {}, r"weight has shape \(11, 15\), and needs \(V, 16\)"),
        (HIDDEN, WEIGHT[0], LABELS, {}, r"weight has shape \(16,\)"),
        (HIDDEN, WEIGHT, LABELS[:1], {}, r"targets have shape \(1, 4\), and need \(2, 4\)"),
        (HIDDEN, WEIGHT, LABELS.flatten(), {}, r"targets have shape \(8,\), and need \(2, 4\)"),
        (HIDDEN, WEIGHT, LABELS.to("meta"), {}, "targets are on meta and hidden on cpu"),
        (HIDDEN, WEIGHT, LABELS, {"softcap": 0.0}, "softcap is 0.0; it has to be above 0"),
        (HIDDEN, WEIGHT, LABELS, {"reduction": "none"}, "reduction is none"),
    ],
)
def test_mistakes_are_explained(
    hidden: Tensor, weight: Tensor, targets: Tensor, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(hidden, weight, targets, **options)


def test_off_the_gpu_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastllama_kernels._library.INTERPRETED", False)
    with pytest.raises(ValueError, match="needs tensors on a CUDA device, not on cpu"):
        linear_cross_entropy(HIDDEN, WEIGHT, LABELS)


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
        in_chunks_of(length, monkeypatch)
        assert_is_the_reference(
            [randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)],
            torch.tensor(targets, device=DEVICE).clamp(max=vocab_size - 1),
            ignore_index=-1,
            **options,
        )


# What only a GPU can show.


@pytest.mark.gpu
def test_the_logits_never_exist() -> None:
    n_tokens, width, vocab_size = 32_768, 256, 32_768
    hidden = torch.randn(n_tokens, width, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocab_size, width, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.arange(n_tokens, device=DEVICE)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_cross_entropy(hidden, weight, targets).backward()
    # All logits in float32, and their gradient.
    held = 2 * 4 * n_tokens * vocab_size
    assert torch.cuda.max_memory_allocated() - before <= held / 8


@pytest.mark.gpu
def test_more_logits_than_int32_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    n_tokens, width, vocab_size = 65_538, 8, 32_768
    in_chunks_of(n_tokens, monkeypatch)
    hidden = torch.randn(n_tokens, width, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(vocab_size, width, device=DEVICE, dtype=torch.bfloat16)
    # The last tokens alone count, those whose logits lie beyond.
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


def forward_and_backward() -> Callable[[], list[Tensor]]:
    leaves = [x.requires_grad_() for x in some(torch.bfloat16)]

    def step() -> list[Tensor]:
        loss = linear_cross_entropy(*leaves, TARGETS, z_loss=0.01)
        return [loss, *torch.autograd.grad(0.37 * loss, leaves)]

    return step


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_never_waits_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    in_chunks_of(3, monkeypatch)
    step = forward_and_backward()
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_cuda_graph_replays_it(monkeypatch: pytest.MonkeyPatch) -> None:
    in_chunks_of(3, monkeypatch)
    step = forward_and_backward()
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
