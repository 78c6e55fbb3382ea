from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fastllama_kernels.rope import rope, rope_reference
from tests.compare import (
    DEVICE,
    DTYPES,
    KERNEL_DTYPES,
    assert_as_exact_as,
    assert_operator_as_exact_as,
    outputs_and_gradients,
    randn,
)

B, T, K = 2, 7, 8
HEADS = [(4, 4), (4, 2), (3, 1)]
Rotated = tuple[Tensor, Tensor, Tensor]


def tables(
    n_positions: int, dtype: torch.dtype = torch.float32, width: int = K, base: float = 100.0
) -> tuple[Tensor, Tensor]:
    frequencies = base ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.outer(torch.arange(n_positions, dtype=torch.float64), frequencies)
    return angles.cos().to(DEVICE, dtype), angles.sin().to(DEVICE, dtype)


def rotate_by_matrices(qkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int, n_kv: int) -> Rotated:
    """Each head times a (K, K) rotation matrix of its position, filled entry by entry."""
    matrices = torch.zeros(qkv.shape[1], K, K, dtype=qkv.dtype, device=qkv.device)
    for t in range(qkv.shape[1]):
        for i in range(K // 2):
            matrices[t, i, i] = matrices[t, i + K // 2, i + K // 2] = cos[t, i]
            matrices[t, i, i + K // 2] = -sin[t, i]
            matrices[t, i + K // 2, i] = sin[t, i]
    width_q, width_kv = n_heads * K, n_kv * K
    q = qkv[..., :width_q].unflatten(-1, (n_heads, K))
    k = qkv[..., width_q : width_q + width_kv].unflatten(-1, (n_kv, K))
    v = qkv[..., width_q + width_kv :].unflatten(-1, (n_kv, K))
    q, k = (torch.einsum("tij,bthj->bthi", matrices, x) for x in (q, k))
    return q, k, v


@pytest.mark.parametrize(("n_heads", "n_kv"), HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_is_a_product_with_rotation_matrices(dtype: torch.dtype, n_heads: int, n_kv: int) -> None:
    qkv = randn(B, T, (n_heads + 2 * n_kv) * K, seed=0, dtype=dtype)
    cos, sin = tables(T + 3)

    def by_matrices(qkv: Tensor) -> Rotated:
        return rotate_by_matrices(qkv, cos, sin, n_heads, n_kv)

    assert_operator_as_exact_as(
        lambda qkv: rope_reference(qkv, cos, sin, n_heads, n_kv), by_matrices, by_matrices, [qkv]
    )


def test_values_pass_bit_for_bit() -> None:
    qkv = randn(B, T, 4 * K, seed=0, dtype=torch.bfloat16)
    _, _, v = rope_reference(qkv, *tables(T), 2, 1)
    assert torch.equal(v, qkv[..., 3 * K :].unflatten(-1, (1, K)))


def test_gradients_are_the_slopes() -> None:
    qkv = randn(1, 3, 4 * K, seed=0).requires_grad_()
    table = tables(3, torch.float64)
    assert torch.autograd.gradcheck(lambda x: rope_reference(x, *table, 2, 1), [qkv])


def test_keeps_lengths() -> None:
    qkv = randn(B, T, 4 * K, seed=0)
    q, _, _ = rope_reference(qkv, *tables(T, torch.float64), 2, 1)
    before = qkv[..., : 2 * K].unflatten(-1, (2, K)).norm(dim=-1)
    torch.testing.assert_close(q.norm(dim=-1), before, rtol=1e-14, atol=0)


def test_scores_depend_on_the_distance_alone() -> None:
    heads = randn(1, 1, 3 * K, seed=0).expand(1, 20, -1)
    q, k, _ = rope_reference(heads, *tables(20, torch.float64), 1, 1)
    scores = torch.einsum("bthk,bshk->ts", q, k)
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1], rtol=1e-12, atol=1e-12)
    assert scores[0].unique().numel() == 20


def test_positions_choose_the_rows_of_the_tables() -> None:
    qkv = randn(B, T, 4 * K, seed=0, dtype=torch.float32)
    cos, sin = tables(20)
    starts = torch.tensor([[0], [9]], device=DEVICE)
    got = rope_reference(qkv, cos, sin, 2, 1, starts + torch.arange(T, device=DEVICE))
    for row, start in enumerate((0, 9)):
        shifted = rope_reference(qkv[row : row + 1], cos[start:], sin[start:], 2, 1)
        for actual, wanted in zip(got, shifted, strict=True):
            assert torch.equal(actual[row : row + 1], wanted)


# From here on the kernels.


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def assert_is_the_reference(
    qkv: Tensor,
    table: tuple[Tensor, Tensor],
    n_heads: int,
    n_kv: int,
    positions: Tensor | None = None,
) -> None:
    def plain(qkv: Tensor) -> Rotated:
        return rope_reference(qkv, *table, n_heads, n_kv, positions)

    # `rope` writes into what it is given: times 1, because a leaf has to survive.
    assert_operator_as_exact_as(
        lambda qkv: rope(qkv * 1, *table, n_heads, n_kv, positions), plain, plain, [qkv]
    )


# 32 + 2 x 8, 5 + 2 x 2 and 9 + 2 heads are no, a partial and a second block of 8 heads.
@pytest.mark.parametrize(
    ("n_heads", "n_kv", "width"),
    [
        (1, 1, 2),
        (1, 1, 64),
        (5, 2, 6),
        (9, 1, 6),
        (32, 8, 2),
        (3, 1, 80),
        (4, 2, 96),
        (2, 2, 128),
        (1, 1, 256),
    ],
)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_heads_of_any_number_and_width(
    dtype: torch.dtype, n_heads: int, n_kv: int, width: int
) -> None:
    qkv = randn(B, T, (n_heads + 2 * n_kv) * width, seed=0, dtype=dtype)
    assert_is_the_reference(qkv, tables(T, width=width), n_heads, n_kv)


# A program takes 64 rows of this width.
@pytest.mark.parametrize(("batch", "time"), [(1, 1), (1, 64), (5, 13), (129, 1)])
def test_any_number_of_rows(batch: int, time: int) -> None:
    qkv = randn(batch, time, 4 * K, seed=0, dtype=torch.float32)
    assert_is_the_reference(qkv, tables(time), 2, 1)


@pytest.mark.parametrize(("batch", "time"), [(0, T), (B, 0)])
def test_no_rows(batch: int, time: int) -> None:
    qkv = randn(batch, time, 4 * K, seed=0, dtype=torch.float32)
    *outputs, gradient = outputs_and_gradients(lambda x: rope(x * 1, *tables(T), 2, 1), [qkv])
    assert [x.shape for x in outputs] == [(batch, time, n, K) for n in (2, 1, 1)]
    assert gradient.shape == qkv.shape


def assert_rounded_once(actual: Tensor, exact: Tensor, magnitude: float) -> None:
    """Each entry is one of the two neighbours of float32 arithmetic on numbers of `magnitude`.

    Neither has to be the nearest: Triton's interpreter cuts bfloat16 off, a GPU rounds it.
    """
    info = torch.finfo(actual.dtype)
    _, exponent = torch.frexp(exact)
    unit = torch.ldexp(torch.full_like(exact, info.eps), exponent - 1)
    unit = unit.clamp(min=info.smallest_normal * info.eps)
    slack = 4 * torch.finfo(torch.float32).eps * magnitude
    assert ((actual.double() - exact).abs() <= unit + slack).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_width_types_are_rounded_once(dtype: torch.dtype) -> None:
    # A table or a product in bfloat16 is as wrong again, and hides behind the largest entry.
    def by(operator: Callable[..., Rotated], qkv: Tensor) -> list[Tensor]:
        return outputs_and_gradients(lambda x: operator(x * 1, *tables(T), 2, 1), [qkv])

    qkv = randn(B, T, 4 * K, seed=0, dtype=dtype)
    for actual, exact in zip(by(rope, qkv), by(rope_reference, qkv.double()), strict=True):
        assert_rounded_once(actual, exact, magnitude=4.0)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_values_and_their_gradient_pass_bit_for_bit(dtype: torch.dtype) -> None:
    qkv = randn(B, T, 5 * K, seed=0, dtype=dtype).requires_grad_()
    _, _, v = rope(qkv * 1, *tables(T), 1, 2)
    assert torch.equal(v, qkv[..., 3 * K :].unflatten(-1, (2, K)))
    upstream = randn(*v.shape, seed=1, dtype=dtype)
    (gradient,) = torch.autograd.grad(v, qkv, upstream)
    assert torch.equal(gradient[..., 3 * K :].unflatten(-1, (2, K)), upstream)


@pytest.mark.parametrize("used", [0, 1, 2])
def test_an_output_that_is_not_used_has_no_gradient(used: int) -> None:
    qkv = randn(B, T, 4 * K, seed=0, dtype=torch.float32)
    table = tables(T)
    assert_operator_as_exact_as(
        lambda x: rope(x * 1, *table, 2, 1)[used],
        lambda x: rope_reference(x, *table, 2, 1)[used],
        lambda x: rope_reference(x, *table, 2, 1)[used],
        [qkv],
    )


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_each_row_has_positions_of_its_own(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    positions = torch.randint(0, 30, (B, T), generator=generator).to(DEVICE, dtype)
    qkv = randn(B, T, 4 * K, seed=0, dtype=torch.float32)
    assert_is_the_reference(qkv, tables(30), 2, 1, positions)


def test_packed_documents_start_again_at_0() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0], [0, 1, 2, 3, 4, 5, 0]], device=DEVICE)
    qkv = randn(B, T, 4 * K, seed=0, dtype=torch.float32)
    # Six positions are less than T, and enough.
    assert_is_the_reference(qkv, tables(6), 2, 1, positions)


@pytest.mark.parametrize(
    "lay_out",
    [
        pytest.param(lambda x: x.mT.contiguous().mT, id="time-first"),
        pytest.param(lambda x: x[:1].expand(B, T), id="one-for-the-batch"),
    ],
)
def test_positions_lie_as_they_like(lay_out: Callable[[Tensor], Tensor]) -> None:
    positions = lay_out(torch.arange(B * T, device=DEVICE).flip(0).view(B, T))
    assert not positions.is_contiguous()
    qkv = randn(B, T, 4 * K, seed=0, dtype=torch.float32)
    assert_is_the_reference(qkv, tables(B * T), 2, 1, positions)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_far_positions_are_not_rounded(dtype: torch.dtype) -> None:
    # In bfloat16 the positions 1995 to 2003 are all 2000.
    positions = torch.arange(1995, 1995 + T, device=DEVICE).expand(B, T)
    qkv = randn(B, T, 4 * K, seed=0, dtype=dtype)
    assert_is_the_reference(qkv, tables(2_048, base=10_000.0), 2, 1, positions)


@pytest.mark.parametrize("start", [1, 9])
def test_an_offset_is_tables_from_there_on(start: int) -> None:
    cos, sin = tables(20)
    qkv = randn(B, T, 4 * K, seed=0, dtype=torch.float32)
    assert_is_the_reference(qkv, (cos[start:], sin[start:]), 2, 1)


def test_tables_may_lie_interleaved() -> None:
    cos, sin = torch.stack(tables(T), dim=-1).unbind(-1)
    assert not cos.is_contiguous()
    assert_is_the_reference(randn(B, T, 4 * K, seed=0, dtype=torch.float32), (cos, sin), 2, 1)


def test_a_rotation_and_its_inverse_are_nothing() -> None:
    cos, sin = tables(T)

    def there_and_back(operator: Callable[..., Rotated]) -> Callable[[Tensor], Rotated]:
        def both(qkv: Tensor) -> Rotated:
            rotated = torch.cat(operator(qkv * 1, cos, sin, 2, 1), dim=2).flatten(-2)
            return operator(rotated, cos, -sin, 2, 1)

        return both

    assert_operator_as_exact_as(
        there_and_back(rope),
        there_and_back(rope_reference),
        lambda qkv: qkv.unflatten(-1, (4, K)).split((2, 1, 1), dim=2),
        [randn(B, T, 4 * K, seed=0, dtype=torch.float32)],
    )


def test_two_rotations_are_one_by_the_sum_of_angles() -> None:
    by_one = tables(T)
    by_two = tables(2 * T, torch.float64)

    def twice(operator: Callable[..., Rotated]) -> Callable[[Tensor], Rotated]:
        def both(qkv: Tensor) -> Rotated:
            rotated = torch.cat(operator(qkv * 1, *by_one, 2, 1), dim=2).flatten(-2)
            return operator(rotated, *by_one, 2, 1)

        return both

    assert_operator_as_exact_as(
        twice(rope),
        twice(rope_reference),
        lambda qkv: rope_reference(qkv, by_two[0][::2], by_two[1][::2], 2, 1),
        [randn(B, T, 4 * K, seed=0, dtype=torch.float32)],
    )


# What happens to the memory.


def test_rotates_where_it_is() -> None:
    qkv = randn(B, T, 4 * K, seed=0, dtype=torch.float32)
    wanted = rope(qkv.clone(), *tables(T), 2, 1)
    outputs = rope(qkv, *tables(T), 2, 1)
    assert outputs[0].data_ptr() == qkv.data_ptr()
    assert torch.equal(qkv, torch.cat(wanted, dim=2).flatten(-2))
    for x, first in zip(outputs, (0, 2, 3), strict=True):
        assert x.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()
        assert x.storage_offset() == first * K


def test_a_dispatch_mode_may_keep_the_input() -> None:
    # As selective checkpointing does, to hand it out again.
    qkv = randn(B, T, 4 * K, seed=0, dtype=torch.float32)
    before = qkv.clone()
    with FlopCounterMode(display=False):
        outputs = rope(qkv, *tables(T), 2, 1)
    assert torch.equal(qkv, before)
    assert all(map(torch.equal, outputs, rope(before, *tables(T), 2, 1)))


def test_the_mutation_is_declared() -> None:
    arguments = torch.ops.fastllama.rope_.default._schema.arguments
    assert [x.name for x in arguments if x.alias_info and x.alias_info.is_write] == ["qkv"]


def transposed(shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    return randn(shape[1], shape[0], shape[2], seed=0, dtype=dtype).transpose(0, 1)


def sliced(shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    return randn(*shape[:2], shape[2] + 3, seed=0, dtype=dtype)[..., 1:-2]


def expanded(shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    return randn(1, *shape[1:], seed=0, dtype=dtype).expand(shape)


@pytest.mark.parametrize("lay_out", [transposed, sliced, expanded])
def test_strided_input_is_read_right_and_left_alone(lay_out: Callable[..., Tensor]) -> None:
    qkv = lay_out((B, T, 4 * K), torch.float32)
    assert not qkv.is_contiguous()
    before, version = qkv.clone(), qkv._version
    outputs = rope(qkv, *tables(T), 2, 1)
    assert torch.equal(qkv, before)
    assert qkv._version == version
    for actual, wanted in zip(outputs, rope(before, *tables(T), 2, 1), strict=True):
        assert torch.equal(actual, wanted)


def test_gradients_pass_through_a_strided_input() -> None:
    def split(operator: Callable[..., Rotated]) -> Callable[[Tensor], Rotated]:
        return lambda x: operator(x.transpose(0, 1), *tables(T), 2, 1)

    qkv = randn(T, B, 4 * K, seed=0, dtype=torch.float32)
    plain = split(rope_reference)
    assert_operator_as_exact_as(split(rope), plain, plain, [qkv])


def test_misaligned_input_after_aligned() -> None:
    size = B * T * 4 * K
    for start in (0, 1):
        numbers = randn(size + 1, seed=0, dtype=torch.bfloat16)
        qkv = numbers[start : start + size].view(B, T, 4 * K)
        exact = rope_reference(qkv.double(), *tables(T), 2, 1)
        for actual, wanted in zip(rope(qkv, *tables(T), 2, 1), exact, strict=True):
            assert_rounded_once(actual, wanted, magnitude=4.0)


def assert_gradients_are_the_reference(lay_out: Callable[[list[Tensor]], list[Tensor]]) -> None:
    """dqkv from the gradients of q, k and v laid out like that."""
    upstream = [randn(B, T, n, K, seed=n, dtype=torch.float32) for n in (4, 2, 2)]
    upstream = lay_out(upstream)

    def dqkv(operator: Callable[..., Rotated], dtype: torch.dtype) -> Tensor:
        qkv = randn(B, T, 8 * K, seed=0, dtype=dtype).requires_grad_()
        outputs = operator(qkv * 1, *tables(T), 4, 2)
        # The conversion of what has the type already is the very same tensor.
        return torch.autograd.grad(outputs, qkv, [x.to(dtype) for x in upstream])[0]

    gradient = dqkv(rope, torch.float32)
    assert gradient.is_contiguous()
    plain, truth = (dqkv(rope_reference, dtype) for dtype in (torch.float32, torch.float64))
    assert_as_exact_as(gradient, plain, truth)


@pytest.mark.parametrize(
    "lay_out",
    [
        pytest.param(lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), id="by-head"),
        pytest.param(lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), id="by-time"),
        pytest.param(lambda x: torch.cat((x, x, x), dim=-1)[..., 3 : 3 + K], id="sliced"),
        pytest.param(lambda x: x.mT.contiguous().mT, id="width-outside"),
        pytest.param(lambda x: x[:1].expand_as(x), id="one-for-the-batch"),
        pytest.param(lambda x: x[:, :1].expand_as(x), id="one-for-all-times"),
        pytest.param(lambda x: x[:, :, :1].expand_as(x), id="one-for-all-heads"),
        pytest.param(lambda x: x.mean().expand_as(x), id="one-for-all"),
    ],
)
def test_gradients_from_above_lie_as_they_like(lay_out: Callable[[Tensor], Tensor]) -> None:
    assert_gradients_are_the_reference(lambda upstream: [lay_out(x) for x in upstream])


def test_each_gradient_from_above_lies_as_it_likes() -> None:
    def lay_out(upstream: list[Tensor]) -> list[Tensor]:
        dq, dk, dv = upstream
        by_head = dk.transpose(1, 2).contiguous().transpose(1, 2)
        return [dq, by_head, torch.cat((dv, dv), dim=-1)[..., 3 : 3 + K]]

    assert_gradients_are_the_reference(lay_out)


def test_gradients_from_above_are_left_alone() -> None:
    qkv = randn(B, T, 4 * K, seed=0, dtype=torch.float32).requires_grad_()
    outputs = rope(qkv * 1, *tables(T), 2, 1)
    upstream = [randn(*x.shape, seed=1, dtype=x.dtype) for x in outputs]
    before = [x.clone() for x in upstream]
    torch.autograd.grad(outputs, qkv, upstream)
    assert all(map(torch.equal, upstream, before))


def test_who_saved_its_output_is_told_that_it_changed() -> None:
    x = randn(B, T, 4 * K, seed=0, dtype=torch.float32).requires_grad_()
    q, _, _ = rope(torch.exp(x), *tables(T), 2, 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        q.mean().backward()


def test_a_projection_needs_no_copy() -> None:
    def project(operator: Callable[..., Rotated]) -> Callable[..., Rotated]:
        return lambda x, weight: operator(x @ weight, *tables(T), 2, 1)

    inputs = [randn(*shape, seed=0, dtype=torch.float32) for shape in ((B, T, 5), (5, 4 * K))]
    plain = project(rope_reference)
    assert_operator_as_exact_as(project(rope), plain, plain, inputs)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_rotates_once(use_reentrant: bool) -> None:
    def gradients(recompute: bool) -> tuple[Tensor, ...]:
        x = randn(B, T, 5, seed=0, dtype=torch.float32).requires_grad_()
        weight = randn(5, 4 * K, seed=1, dtype=torch.float32).requires_grad_()

        def scores(x: Tensor) -> Tensor:
            q, k, _ = rope(x @ weight, *tables(T), 2, 1)
            return (q * k).sum(-1)

        out = checkpoint(scores, x, use_reentrant=use_reentrant) if recompute else scores(x)
        # Reentrant checkpoints fill `.grad` alone.
        out.backward(randn(B, T, 2, seed=2, dtype=torch.float32))
        assert x.grad is not None
        assert weight.grad is not None
        return out.detach(), x.grad, weight.grad

    assert all(map(torch.equal, gradients(recompute=True), gradients(recompute=False)))


def test_recomputation_from_what_was_rotated_is_an_error() -> None:
    def scores(qkv: Tensor) -> Tensor:
        q, k, _ = rope(qkv, *tables(T), 2, 1)
        return (q * k).sum(-1)

    x = randn(B, T, 4 * K, seed=0, dtype=torch.float32).requires_grad_()
    out = checkpoint(scores, x * 1, use_reentrant=False)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.mean().backward()


# How it sits in autograd.


def test_a_second_backward_gives_the_same_bits() -> None:
    qkv = randn(B, T, 4 * K, seed=0, dtype=torch.bfloat16).requires_grad_()
    outputs = rope(qkv * 1, *tables(T), 2, 1)
    upstream = [randn(*x.shape, seed=1, dtype=x.dtype) for x in outputs]
    (first,) = torch.autograd.grad(outputs, qkv, upstream, retain_graph=True)
    first = first.clone()
    assert torch.equal(torch.autograd.grad(outputs, qkv, upstream)[0], first)


def test_a_second_run_gives_the_same_bits() -> None:
    qkv = randn(B, T, 4 * K, seed=0, dtype=torch.bfloat16)
    first, second = (
        outputs_and_gradients(lambda x: rope(x * 1, *tables(T), 2, 1), [qkv]) for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


def test_a_gradient_of_the_gradient_is_an_error() -> None:
    qkv = randn(B, T, 4 * K, seed=0, dtype=torch.float32).requires_grad_()
    q, _, _ = rope(qkv * 1, *tables(T), 2, 1)
    (gradient,) = torch.autograd.grad(q.square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Callable[[], torch.no_grad]) -> None:
    qkv = randn(B, T, 4 * K, seed=0, dtype=torch.float32).requires_grad_()
    wanted = rope(qkv * 1, *tables(T), 2, 1)
    with mode():
        outputs = rope(qkv * 1, *tables(T), 2, 1)
    assert all(map(torch.equal, outputs, wanted))
    assert not any(x.requires_grad for x in outputs)


def test_frozen_input_makes_no_graph() -> None:
    qkv = randn(B, T, 4 * K, seed=0, dtype=torch.float32)
    assert not any(x.requires_grad for x in rope(qkv, *tables(T), 2, 1))


def test_autocast_changes_nothing() -> None:
    qkv = randn(B, T, 4 * K, seed=0, dtype=torch.float32)
    wanted = rope(qkv * 1, *tables(T), 2, 1)
    with torch.autocast(DEVICE, torch.bfloat16):
        outputs = rope(qkv, *tables(T), 2, 1)
    assert all(map(torch.equal, outputs, wanted))


QKV = torch.zeros(B, T, 4 * K)
COS, SIN = torch.ones(T, K // 2), torch.zeros(T, K // 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((QKV.double(), COS, SIN, 2, 1), "qkv is torch.float64"),
        ((QKV[..., :-1], COS, SIN, 2, 1), r"qkv has shape \(2, 7, 31\).* need \(B, T, 32\)"),
        ((QKV, COS, SIN, 1, 1), r"1 \+ 2 x 1 heads .* need \(B, T, 24\)"),
        ((QKV[0], COS, SIN, 2, 1), r"qkv has shape \(7, 32\)"),
        ((QKV, COS.bfloat16(), SIN.bfloat16(), 2, 1), r"cos is torch.bfloat16 .* float32"),
        ((QKV, COS, SIN.double(), 2, 1), r"sin torch.float64 .* float32"),
        ((QKV, COS, SIN[:-1], 2, 1), r"cos is .* \(7, 4\) and sin .* \(6, 4\)"),
        ((QKV, COS[:-1], SIN[:-1], 2, 1), "have 6 positions, and the sequences 7"),
        ((QKV, COS, SIN, 2, 1, torch.arange(T)), r"positions has shape \(7,\), and needs \(2, 7\)"),
    ],
)
def test_mistakes_are_explained(arguments: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rope(*arguments)


def test_off_the_gpu_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastllama_kernels._library.INTERPRETED", False)
    with pytest.raises(ValueError, match="rope_ needs tensors on a CUDA device, not on cpu"):
        rope(QKV, COS, SIN, 2, 1)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    time=st.integers(1, 9),
    n_heads=st.integers(1, 9),
    n_kv=st.integers(1, 3),
    half=st.integers(1, 9),
    dtype=st.sampled_from(KERNEL_DTYPES),
    given_positions=st.booleans(),
)
def test_any_shape(
    batch: int,
    time: int,
    n_heads: int,
    n_kv: int,
    half: int,
    dtype: torch.dtype,
    given_positions: bool,
) -> None:
    qkv = randn(batch, time, (n_heads + 2 * n_kv) * 2 * half, seed=0, dtype=dtype)
    generator = torch.Generator().manual_seed(batch * time)
    positions = torch.randint(0, 11, (batch, time), generator=generator).to(DEVICE)
    table = tables(11, width=2 * half)
    assert_is_the_reference(qkv, table, n_heads, n_kv, positions if given_positions else None)


# What only a GPU can show.


@pytest.mark.gpu
def test_more_entries_than_int32_counts() -> None:
    time, n_heads, n_kv, width = 1_024, 8, 4, 128
    batch = 2**31 // (time * (n_heads + 2 * n_kv) * width) + 1
    cos, sin = tables(time, width=width)
    shape = (batch, time, (n_heads + 2 * n_kv) * width)
    qkv = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)
    exact = rope_reference(qkv[-1:].double(), cos, sin, n_heads, n_kv)
    outputs = rope(qkv.requires_grad_(), cos, sin, n_heads, n_kv)
    for actual, wanted in zip(outputs, exact, strict=True):
        assert_rounded_once(actual[-1:], wanted, magnitude=8.0)
    # The outputs as gradients from above turn back.
    (gradient,) = torch.autograd.grad(outputs, qkv, [x.detach() for x in outputs])
    back = rope_reference(qkv[-1:].detach().double(), cos, -sin, n_heads, n_kv)
    wanted = torch.cat(back, dim=2).flatten(-2)
    assert_rounded_once(gradient[-1:], wanted, magnitude=8.0)


def forward_and_backward() -> Callable[[], list[Tensor]]:
    qkv = randn(B, T, 4 * K, seed=0, dtype=torch.bfloat16).requires_grad_()
    table, positions = tables(T), torch.arange(T, device=DEVICE).expand(B, T)
    upstream = [randn(B, T, n, K, seed=n, dtype=torch.bfloat16) for n in (2, 1, 1)]

    def step() -> list[Tensor]:
        outputs = rope(qkv * 1, *table, 2, 1, positions)
        return [*outputs, *torch.autograd.grad(outputs, qkv, upstream)]

    return step


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_never_waits_for_the_gpu() -> None:
    step = forward_and_backward()
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_cuda_graph_replays_it() -> None:
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
