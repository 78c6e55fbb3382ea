import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama_kernels._dtype import accumulation_dtype
from fastllama_kernels.attention import (
    attention,
    attention_by_matmuls,
    attention_reference,
    document_starts,
)
from fastllama_kernels.attention_backends import Attention
from tests.compare import DEVICE, DTYPES, assert_operator_as_exact_as, randn

B, K = 2, 8
# Exact on a CPU. On an H100 the result of a softmax over one score is a rounding or two off.
ROUNDED = {"rtol": 0.0 if DEVICE == "cpu" else 4 * torch.finfo(torch.float32).eps, "atol": 0.0}
# Two ways to pack 9 tokens, 3 documents and 2, an empty one in the middle, and padding.
CU_SEQLENS = torch.tensor([0, 2, 3, 3, 9, 14, 18, 18], dtype=torch.int32, device=DEVICE)


def query_by_query(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, cu_seqlens: Tensor | None = None
) -> Tensor:
    """One query at a time: the softmax over the keys that the query sees."""
    n_queries, n_heads, n_keys = q.shape[1], q.shape[2], k.shape[1]
    group = n_heads // k.shape[2]
    out = torch.empty_like(q)
    for b in range(len(q)):
        for t in range(n_queries):
            position = n_keys - n_queries + t
            visible = range(position + 1 if causal else n_keys)
            if cu_seqlens is not None:
                bounds = (cu_seqlens - b * n_keys).tolist()
                begin = max(x for x in bounds if x <= position)
                end = min(x for x in bounds if x > position)
                visible = range(begin, min(end, visible.stop))
            for h in range(n_heads):
                keys, values = (x[b, visible.start : visible.stop, h // group] for x in (k, v))
                weights = torch.softmax(keys @ q[b, t, h] / math.sqrt(K), dim=0)
                out[b, t, h] = weights @ values
    return out


def qkv(
    n_queries: int,
    n_keys: int,
    heads: tuple[int, int],
    dtype: torch.dtype,
    device: str = DEVICE,
) -> list[Tensor]:
    shapes = [(n_queries, heads[0]), (n_keys, heads[1]), (n_keys, heads[1])]
    return [
        randn(B, *shape, K, seed=seed, dtype=dtype, device=device)
        for seed, shape in enumerate(shapes)
    ]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize(("n_queries", "n_keys"), [(6, 6), (1, 6), (3, 6)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_matches_softmax_over_visible_keys(
    dtype: torch.dtype, n_queries: int, n_keys: int, heads: tuple[int, int], causal: bool
) -> None:
    def slow(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return query_by_query(q, k, v, causal=causal)

    assert_operator_as_exact_as(
        lambda q, k, v: attention_reference(q, k, v, causal=causal),
        slow,
        slow,
        qkv(n_queries, n_keys, heads, dtype),
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("operator", [attention_reference, attention_by_matmuls])
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_documents(
    dtype: torch.dtype, operator: Attention, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return query_by_query(q, k, v, causal=causal, cu_seqlens=CU_SEQLENS)

    # Documents begin inside of blocks of queries and go on in the next.
    monkeypatch.setattr(sys.modules["fastllama_kernels.attention"], "BLOCK", 4)
    assert_operator_as_exact_as(
        lambda q, k, v: operator(q, k, v, causal=causal, cu_seqlens=CU_SEQLENS),
        slow,
        slow,
        qkv(9, 9, (4, 2), dtype),
    )


def test_documents_of_one_token_see_themselves() -> None:
    q, k, v = qkv(1, 1, (2, 2), torch.float32)
    cu_seqlens = torch.arange(B + 1, dtype=torch.int32, device=DEVICE)
    torch.testing.assert_close(attention(q, k, v, cu_seqlens=cu_seqlens), v, **ROUNDED)


@pytest.mark.parametrize("n_queries", [1, 4])
def test_packed_documents_are_not_decoded(n_queries: int) -> None:
    with pytest.raises(ValueError, match=f"as many queries as keys, not {n_queries} and 9"):
        attention(*qkv(n_queries, 9, (4, 2), torch.float32), cu_seqlens=CU_SEQLENS)


@pytest.mark.parametrize("n_tokens", [2, 4, 11])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matmuls_match_reference(
    dtype: torch.dtype,
    heads: tuple[int, int],
    n_tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The module; the package has the function under this name.
    monkeypatch.setattr(sys.modules["fastllama_kernels.attention"], "BLOCK", 4)
    assert_operator_as_exact_as(
        attention_by_matmuls,
        attention_reference,
        attention_reference,
        # The operator is made for CPUs.
        qkv(n_tokens, n_tokens, heads, dtype, "cpu"),
    )


@pytest.mark.parametrize(
    ("n_queries", "options"),
    [(1, {}), (4, {}), (9, {"causal": False}), (9, {"causal": False, "cu_seqlens": CU_SEQLENS})],
)
def test_matmuls_leave_other_calls_to_attention(n_queries: int, options: dict[str, Any]) -> None:
    inputs = qkv(n_queries, 9, (4, 2), torch.float32)
    assert torch.equal(attention_by_matmuls(*inputs, **options), attention(*inputs, **options))


@pytest.mark.parametrize("dtype", DTYPES)
def test_matmuls_save_one_matrix_of_scores(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["fastllama_kernels.attention"], "BLOCK", 4)
    inputs = [x.requires_grad_() for x in qkv(11, 11, (2, 2), dtype)]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out = attention_by_matmuls(*inputs)
    blocks = [(4, 4), (4, 8), (3, 11)]
    n_sums = B * 2 * 11
    n_scores = B * 2 * sum(queries * keys for queries, keys in blocks)
    found = sum(x.nbytes for x in saved)
    sums = n_sums * accumulation_dtype(out).itemsize
    assert found == 4 * out.nbytes + n_scores * dtype.itemsize + sums


def test_single_token_sees_itself() -> None:
    q, k, v = qkv(1, 1, (2, 2), torch.float32)
    torch.testing.assert_close(attention_reference(q, k, v), v, **ROUNDED)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("operator", [attention_reference, attention_by_matmuls])
def test_tokens_see_no_other_document(operator: Attention, causal: bool) -> None:
    q, k, v = qkv(9, 9, (4, 2), torch.float32)
    before = operator(q, k, v, causal=causal, cu_seqlens=CU_SEQLENS)
    k[:, 2], v[:, 2] = 100.0, 100.0
    changed = operator(q, k, v, causal=causal, cu_seqlens=CU_SEQLENS) != before
    positions = changed.any(dim=(2, 3))
    # Token 2 is a whole document in the first sequence; in the second its document is 0 to 4.
    assert positions[0].nonzero().flatten().tolist() == [2]
    assert positions[1].nonzero().flatten().tolist() == list(range(2 if causal else 0, 5))


def test_tokens_see_no_later_token() -> None:
    q, k, v = qkv(6, 6, (2, 2), torch.float32)
    before = attention_reference(q, k, v)
    k[:, 4], v[:, 4] = 100.0, 100.0
    changed = (attention_reference(q, k, v) != before).any(dim=(0, 2, 3))
    assert changed.tolist() == [False] * 4 + [True] * 2


def test_gradcheck() -> None:
    leaves = [x.requires_grad_() for x in qkv(9, 9, (2, 1), torch.float64)]
    assert torch.autograd.gradcheck(
        lambda q, k, v: attention_reference(q, k, v, cu_seqlens=CU_SEQLENS), leaves
    )


def test_document_starts() -> None:
    starts = document_starts(CU_SEQLENS, 18)
    assert starts.dtype == torch.int32
    assert starts.tolist() == [0] * 2 + [2] + [3] * 6 + [9] * 5 + [14] * 4
