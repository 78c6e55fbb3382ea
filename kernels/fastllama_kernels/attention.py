"""Attention: out = softmax(q k^T / sqrt(K) + mask) v, per head, with grouped key/value heads.

Shapes: q (B, T, H, K); k, v (B, S, G, K), G dividing H; out (B, T, H, K). The causal mask is
aligned to the end: query t sees keys 0 to S - T + t. With `cu_seqlens` the B sequences are packed
documents and a query sees only its own: cu_seqlens (B, D + 1) int32 holds where each document
begins, padded with T.
Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762; Ainslie et al. 2023 for the groups.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def attention_reference(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    *,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Attend from `q` (B, T, H, K) over `k`, `v` (B, S, G, K); returns (B, T, H, K)."""
    n_queries, n_keys = q_BTHK.shape[1], k_BSGK.shape[1]
    group = q_BTHK.shape[2] // k_BSGK.shape[2]
    if group > 1:
        k_BSGK, v_BSGK = (x.repeat_interleave(group, dim=2) for x in (k_BSGK, v_BSGK))
    mask = None
    if cu_seqlens is not None or (causal and n_queries not in (1, n_keys)):
        mask = _mask(n_queries, n_keys, causal, cu_seqlens, q_BTHK.device)
    out_BHTK = F.scaled_dot_product_attention(
        q_BTHK.transpose(1, 2),
        k_BSGK.transpose(1, 2),
        v_BSGK.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal and mask is None and n_queries > 1,
    )
    return out_BHTK.transpose(1, 2)


def flatten_cu_seqlens(cu_seqlens: Tensor, n_tokens: int) -> Tensor:
    """Boundaries of the documents of all rows laid end to end, as variable-length kernels want.

    The shape is static and nothing is read back to the host, so the padding of a row, and the end
    of one that is the beginning of the next, stay as documents of length 0.

    Args:
        cu_seqlens: (B, D + 1) int32, padded with T.
        n_tokens: T.

    Returns:
        (B * (D + 1),) int32, from 0 to B * T.
    """
    offsets_B = torch.arange(
        0,
        len(cu_seqlens) * n_tokens,
        n_tokens,
        dtype=cu_seqlens.dtype,
        device=cu_seqlens.device,
    )
    return (cu_seqlens + offsets_B[:, None]).flatten()


def _mask(
    n_queries: int,
    n_keys: int,
    causal: bool,
    cu_seqlens: Tensor | None,
    device: torch.device,
) -> Tensor:
    """True where a query may look, (T, S) or (B, 1, T, S)."""
    mask = torch.ones(n_queries, n_keys, dtype=torch.bool, device=device)
    if causal:
        mask = mask.tril(diagonal=n_keys - n_queries)
    if cu_seqlens is None:
        return mask
    positions = torch.arange(n_keys, dtype=cu_seqlens.dtype, device=device)
    positions = positions.expand(len(cu_seqlens), n_keys).contiguous()
    document_BS = torch.searchsorted(cu_seqlens.contiguous(), positions, right=True)
    document_BT = document_BS[:, n_keys - n_queries :]
    return mask & (document_BT[:, None, :, None] == document_BS[:, None, None, :])
