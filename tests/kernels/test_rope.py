from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastllama_kernels.rope import rope, rope_reference
from tests.compare import (
    DEVICE,
    DTYPES,
    KERNEL_DTYPES,
    assert_operator_as_exact_as,
    assert_rounded_once,
    outputs_and_gradients,
    randn,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

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
    """Multiply each head by the (K, K) rotation matrix of its position."""
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
def test_reference_matches_rotation_matrices(dtype: torch.dtype, n_heads: int, n_kv: int) -> None:
    qkv = randn(B, T, (n_heads + 2 * n_kv) * K, seed=0, dtype=dtype)
    cos, sin = tables(T + 3)

    def with_matrices(qkv: Tensor) -> Rotated:
        return rotate_by_matrices(qkv, cos, sin, n_heads, n_kv)

    assert_operator_as_exact_as(
        lambda qkv: rope_reference(qkv, cos, sin, n_heads, n_kv),
        with_matrices,
        with_matrices,
        [qkv],
    )


def test_reference_leaves_values_alone() -> None:
    qkv = randn(B, T, 4 * K, seed=0, dtype=torch.bfloat16)
    _, _, v = rope_reference(qkv, *tables(T), 2, 1)
    assert torch.equal(v, qkv[..., 3 * K :].unflatten(-1, (1, K)))


def test_reference_keeps_norms() -> None:
    qkv = randn(B, T, 4 * K, seed=0)
    q, _, _ = rope_reference(qkv, *tables(T, torch.float64), 2, 1)
    before = qkv[..., : 2 * K].unflatten(-1, (2, K)).norm(dim=-1)
    torch.testing.assert_close(q.norm(dim=-1), before, rtol=1e-14, atol=0)


def test_reference_scores_depend_on_distance_alone() -> None:
    heads = randn(1, 1, 3 * K, seed=0).expand(1, 20, -1)
    q, k, _ = rope_reference(heads, *tables(20, torch.float64), 1, 1)
    scores = torch.einsum("bthk,bshk->ts", q, k)
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1], rtol=1e-12, atol=1e-12)
    assert scores[0].unique().numel() == 20


def test_reference_positions_index_the_tables() -> None:
    qkv = randn(B, T, 4 * K, seed=0, dtype=torch.float32)
    cos, sin = tables(20)
    starts = torch.tensor([[0], [9]], device=DEVICE)
    outputs = rope_reference(qkv, cos, sin, 2, 1, starts + torch.arange(T, device=DEVICE))
    for row, start in enumerate((0, 9)):
        shifted = rope_reference(qkv[row : row + 1], cos[start:], sin[start:], 2, 1)
        for actual, expected in zip(outputs, shifted, strict=True):
            assert torch.equal(actual[row : row + 1], expected)


# The kernels.


def assert_matches_reference(
    qkv: Tensor,
    table: tuple[Tensor, Tensor],
    n_heads: int,
    n_kv: int,
    positions: Tensor | None = None,
) -> None:
    def plain(qkv: Tensor) -> Rotated:
        return rope_reference(qkv, *table, n_heads, n_kv, positions)

    # rope writes to its input; the `* 1` protects the leaf.
    assert_operator_as_exact_as(
        lambda qkv: rope(qkv * 1, *table, n_heads, n_kv, positions), plain, plain, [qkv]
    )


# A block has 8 heads: 32 + 2 x 8 fill blocks, 5 + 2 x 2 and 9 + 2 leave a partial one.
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
def test_any_heads(dtype: torch.dtype, n_heads: int, n_kv: int, width: int) -> None:
    qkv = randn(B, T, (n_heads + 2 * n_kv) * width, seed=0, dtype=dtype)
    assert_matches_reference(qkv, tables(T, width=width), n_heads, n_kv)


# A program takes 64 rows of this width.
@pytest.mark.parametrize(("batch", "time"), [(1, 1), (1, 64), (5, 13), (129, 1)])
def test_any_number_of_rows(batch: int, time: int) -> None:
    qkv = randn(batch, time, 4 * K, seed=0, dtype=torch.float32)
    assert_matches_reference(qkv, tables(time), 2, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_once(dtype: torch.dtype) -> None:
    # The comparator bounds the error by the largest entry, which hides bfloat16 arithmetic.
    def results(operator: Callable[..., Rotated], qkv: Tensor) -> list[Tensor]:
        return outputs_and_gradients(lambda x: operator(x * 1, *tables(T), 2, 1), [qkv])

    qkv = randn(B, T, 4 * K, seed=0, dtype=dtype)
    for actual, exact in zip(
        results(rope, qkv), results(rope_reference, qkv.double()), strict=True
    ):
        assert_rounded_once(actual, exact, magnitude=4.0)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_values_and_their_gradient_are_copied(dtype: torch.dtype) -> None:
    qkv = randn(B, T, 5 * K, seed=0, dtype=dtype).requires_grad_()
    _, _, v = rope(qkv * 1, *tables(T), 1, 2)
    assert torch.equal(v, qkv[..., 3 * K :].unflatten(-1, (2, K)))
    upstream = randn(*v.shape, seed=1, dtype=dtype)
    (gradient,) = torch.autograd.grad(v, qkv, upstream)
    assert torch.equal(gradient[..., 3 * K :].unflatten(-1, (2, K)), upstream)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_positions_of_each_sequence(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    positions = torch.randint(0, 30, (B, T), generator=generator).to(DEVICE, dtype)
    qkv = randn(B, T, 4 * K, seed=0, dtype=torch.float32)
    assert_matches_reference(qkv, tables(30), 2, 1, positions)


def test_positions_of_packed_documents() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0], [0, 1, 2, 3, 4, 5, 0]], device=DEVICE)
    qkv = randn(B, T, 4 * K, seed=0, dtype=torch.float32)
    # With positions, the tables may have fewer than T rows.
    assert_matches_reference(qkv, tables(6), 2, 1, positions)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_far_positions_are_not_rounded(dtype: torch.dtype) -> None:
    # bfloat16 rounds each of 1995 to 2003 to 2000.
    positions = torch.arange(1995, 1995 + T, device=DEVICE).expand(B, T)
    qkv = randn(B, T, 4 * K, seed=0, dtype=dtype)
    assert_matches_reference(qkv, tables(2_048, base=10_000.0), 2, 1, positions)


@pytest.mark.parametrize("start", [1, 9])
def test_tables_from_an_offset(start: int) -> None:
    cos, sin = tables(20)
    qkv = randn(B, T, 4 * K, seed=0, dtype=torch.float32)
    assert_matches_reference(qkv, (cos[start:], sin[start:]), 2, 1)


def test_inverse_rotation() -> None:
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


def test_two_rotations_add_their_angles() -> None:
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


# Memory and recomputation.


def test_outputs_are_views_of_the_input() -> None:
    qkv = randn(B, T, 4 * K, seed=0, dtype=torch.float32)
    expected = rope(qkv.clone(), *tables(T), 2, 1)
    outputs = rope(qkv, *tables(T), 2, 1)
    assert outputs[0].data_ptr() == qkv.data_ptr()
    assert torch.equal(qkv, torch.cat(expected, dim=2).flatten(-2))
    for x, first in zip(outputs, (0, 2, 3), strict=True):
        assert x.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()
        assert x.storage_offset() == first * K


def test_rotates_the_result_of_a_matmul() -> None:
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
        # Reentrant checkpointing supports `.grad` only.
        out.backward(randn(B, T, 2, seed=2, dtype=torch.float32))
        assert x.grad is not None
        assert weight.grad is not None
        return out.detach(), x.grad, weight.grad

    assert all(map(torch.equal, gradients(recompute=True), gradients(recompute=False)))


def test_recomputation_from_a_rotated_input_raises() -> None:
    def scores(qkv: Tensor) -> Tensor:
        q, k, _ = rope(qkv, *tables(T), 2, 1)
        return (q * k).sum(-1)

    x = randn(B, T, 4 * K, seed=0, dtype=torch.float32).requires_grad_()
    out = checkpoint(scores, x * 1, use_reentrant=False)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.mean().backward()


QKV = torch.zeros(B, T, 4 * K)
COS, SIN = torch.ones(T, K // 2), torch.zeros(T, K // 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
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
def test_wrong_arguments(arguments: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rope(*arguments)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    time=st.integers(1, 9),
    n_heads=st.integers(1, 9),
    n_kv=st.integers(1, 3),
    n_pairs=st.integers(1, 9),
    dtype=st.sampled_from(KERNEL_DTYPES),
    with_positions=st.booleans(),
)
def test_any_shape(
    batch: int,
    time: int,
    n_heads: int,
    n_kv: int,
    n_pairs: int,
    dtype: torch.dtype,
    with_positions: bool,
) -> None:
    qkv = randn(batch, time, (n_heads + 2 * n_kv) * 2 * n_pairs, seed=0, dtype=dtype)
    generator = torch.Generator().manual_seed(batch * time)
    positions = torch.randint(0, 11, (batch, time), generator=generator).to(DEVICE)
    table = tables(11, width=2 * n_pairs)
    assert_matches_reference(qkv, table, n_heads, n_kv, positions if with_positions else None)
