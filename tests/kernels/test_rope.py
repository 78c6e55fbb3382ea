import pytest
import torch
from torch import Tensor

from fastllama_kernels.rope import rope_reference
from tests.compare import DTYPES, assert_operator_as_exact_as, randn

B, T, K = 2, 7, 8
HEADS = [(4, 4), (4, 2), (3, 1)]
Rotated = tuple[Tensor, Tensor, Tensor]


def tables(n_positions: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    frequencies = 100.0 ** -(torch.arange(0, K, 2, dtype=torch.float64) / K)
    angles = torch.outer(torch.arange(n_positions, dtype=torch.float64), frequencies)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate_by_matrices(qkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int, n_kv: int) -> Rotated:
    """Each head times a (K, K) rotation matrix of its position, filled entry by entry."""
    matrices = torch.zeros(qkv.shape[1], K, K, dtype=qkv.dtype)
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
    starts = torch.tensor([[0], [9]])
    got = rope_reference(qkv, cos, sin, 2, 1, starts + torch.arange(T))
    for row, start in enumerate((0, 9)):
        shifted = rope_reference(qkv[row : row + 1], cos[start:], sin[start:], 2, 1)
        for actual, wanted in zip(got, shifted, strict=True):
            assert torch.equal(actual[row : row + 1], wanted)
