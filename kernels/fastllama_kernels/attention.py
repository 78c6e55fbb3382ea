"""Attention: out = softmax(q k^T / sqrt(K) + mask) v, per head, with grouped key/value heads.

Shapes: q (B, T, H, K); k, v (B, S, G, K), H a multiple of G; out (B, T, H, K). The causal mask is
aligned to the end: query t sees keys 0 to S - T + t. `cu_seqlens` marks packed documents: a query
then sees only the keys of its own document. It is (B, n_docs + 1) int32 and holds the position
where each document of a sequence starts, padded with S.
Saved for backward: q, k, v, out and the softmax statistics, by PyTorch.
Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762; Ainslie et al. 2023 for the groups,
https://arxiv.org/abs/2305.13245.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastllama_kernels._dtype import accumulation_dtype

_NOT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attention_reference(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    *,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Attend from `q` (B, T, H, K) over `k`, `v` (B, S, G, K); return (B, T, H, K).

    Any device and float dtype. For the arguments see `attention`.
    """
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


def attention(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    *,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Attend from `q` over `k` and `v` on the kernel that PyTorch's SDPA picks.

    PyTorch may pick cuDNN only for T == S > 1 without `cu_seqlens`. cuDNN returns NaN for some
    masks, and in decoding it would build a plan for every number of keys.

    Args:
        q_BTHK: queries, on any device, in any float dtype.
        k_BSGK: keys, same dtype; H is a multiple of G.
        v_BSGK: values, same dtype.
        causal: hide later keys; query t then sees keys 0 to S - T + t.
        cu_seqlens: (B, n_docs + 1) int32, the start of each packed document, padded with S;
            None means one document per sequence.

    Returns:
        (B, T, H, K) in the dtype of `q`.
    """
    if cu_seqlens is None and q_BTHK.shape[1] == k_BSGK.shape[1] > 1:
        return attention_reference(q_BTHK, k_BSGK, v_BSGK, causal=causal)
    return attention_without_cudnn(q_BTHK, k_BSGK, v_BSGK, causal=causal, cu_seqlens=cu_seqlens)


def attention_without_cudnn(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    *,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """`attention_reference` on the SDPA kernels that take any mask and any number of keys."""
    with sdpa_kernel(_NOT_CUDNN):
        return attention_reference(q_BTHK, k_BSGK, v_BSGK, causal=causal, cu_seqlens=cu_seqlens)


BLOCK = 128
"""Queries of a block of `attention_by_matmuls`."""


def attention_by_matmuls(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    *,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """`attention` as matmuls and a softmax, for training on a CPU under torch.compile.

    PyTorch's flash kernel for CPUs multiplies small tiles. Whole matmuls over blocks of queries are
    faster, and torch.compile fuses what is between them. A block reads no keys behind its last
    query. The softmax is saved for the backward, 2 B H T^2 bytes at most in bfloat16. Other calls
    than T == S > 1, causal, without `cu_seqlens`, run as `attention`.
    """
    B, T, H, K = q_BTHK.shape
    if cu_seqlens is not None or not causal or not k_BSGK.shape[1] == T > 1:
        return attention(q_BTHK, k_BSGK, v_BSGK, causal=causal, cu_seqlens=cu_seqlens)
    group = H // k_BSGK.shape[2]
    if group > 1:
        k_BSGK, v_BSGK = (x.repeat_interleave(group, dim=2) for x in (k_BSGK, v_BSGK))
    q, k, v = (x.transpose(1, 2).reshape(B * H, T, K) for x in (q_BTHK, k_BSGK, v_BSGK))
    wide = accumulation_dtype(q)
    positions = torch.arange(T, device=q.device)
    blocks = []
    for start in range(0, T, BLOCK):
        end = min(start + BLOCK, T)
        scores = (q[:, start:end] @ k[:, :end].mT).to(wide) * K**-0.5
        hidden = positions[start:end, None] < positions[:end]
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).to(v.dtype)
        blocks.append(weights @ v[:, :end])
    return torch.cat(blocks, dim=1).view(B, H, T, K).transpose(1, 2)


def flatten_cu_seqlens(cu_seqlens: Tensor, n_tokens: int) -> Tensor:
    """Concatenate the document boundaries of all sequences, for variable-length kernels.

    The shape is static and no value is read back to the host. Padding, and the boundary between
    two sequences, therefore remain as documents of length 0.

    Args:
        cu_seqlens: (B, n_docs + 1) int32, padded with T.
        n_tokens: T.

    Returns:
        (B * (n_docs + 1),) int32, from 0 to B * T.
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
    """True where a query sees a key; (T, S), or (B, 1, T, S) with `cu_seqlens`."""
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
