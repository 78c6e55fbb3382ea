"""Attention: out = softmax(q k^T / sqrt(K) + mask) v, per head, with grouped key/value heads.

Shapes: q (B, T, H, K); k, v (B, S, G, K), H a multiple of G; out (B, T, H, K). The causal mask is
aligned to the end: query t sees keys 0 to S - T + t. `cu_seqlens` marks packed documents: a query
then sees only the keys of its own document, and T == S. As in FlashAttention it is flat, (n_docs +
1,) int32, and counts over all B * T tokens: where each document starts, then B * T, which may be
repeated to reach a fixed length. Every sequence starts a document.
Saved for backward: q, k, v, out and the softmax statistics, by PyTorch.
Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762; Ainslie et al. 2023 for the groups,
https://arxiv.org/abs/2305.13245.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
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
    if cu_seqlens is not None and n_queries != n_keys:
        raise ValueError(
            f"cu_seqlens packs documents of as many queries as keys, not {n_queries} and {n_keys}."
        )
    group = q_BTHK.shape[2] // k_BSGK.shape[2]
    if group > 1:
        k_BSGK, v_BSGK = (x.repeat_interleave(group, dim=2) for x in (k_BSGK, v_BSGK))
    mask = None
    if cu_seqlens is not None or (causal and n_queries not in (1, n_keys)):
        mask = torch.ones(n_queries, n_keys, dtype=torch.bool, device=q_BTHK.device)
        if causal:
            mask = mask.tril(diagonal=n_keys - n_queries)
        if cu_seqlens is not None:
            starts_BT = document_starts(cu_seqlens, len(q_BTHK) * n_queries).view(-1, n_queries)
            mask = mask & (starts_BT[:, None, :, None] == starts_BT[:, None, None, :])
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
        cu_seqlens: (n_docs + 1,) int32, the start of each packed document among the B * T tokens,
            padded with B * T; None means one document per sequence.

    Returns:
        (B, T, H, K) in the dtype of `q`.

    Raises:
        ValueError: `cu_seqlens` with T != S.
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
    query. Other calls than T == S > 1, causal, run as `attention`.
    """
    B, T, H, K = q_BTHK.shape
    if not causal or not k_BSGK.shape[1] == T > 1:
        return attention(q_BTHK, k_BSGK, v_BSGK, causal=causal, cu_seqlens=cu_seqlens)
    group = H // k_BSGK.shape[2]
    if group > 1:
        k_BSGK, v_BSGK = (x.repeat_interleave(group, dim=2) for x in (k_BSGK, v_BSGK))
    q_XTK, k_XTK, v_XTK = (x.transpose(1, 2).reshape(B * H, T, K) for x in (q_BTHK, k_BSGK, v_BSGK))
    first_XT1 = None
    if cu_seqlens is not None:
        starts_BT = document_starts(cu_seqlens, B * T).view(B, T)
        first_BT = (starts_BT - starts_BT[:, :1]).int()
        first_XT1 = first_BT.repeat_interleave(H, dim=0).unsqueeze(-1)
    out_XTK: Tensor = _AttentionByMatmuls.apply(q_XTK, k_XTK, v_XTK, first_XT1)
    return out_XTK.view(B, H, T, K).transpose(1, 2)


class _AttentionByMatmuls(torch.autograd.Function):
    """Causal attention of X = B * H heads, (X, T, K); `first_XT1` is the first key a query sees.

    Saves the exponentials of the scores in the dtype of q, at most 2 X T^2 bytes in bfloat16, and
    their sums. Matmuls read contiguous blocks, because PyTorch would copy others by itself.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, first_XT1: Tensor | None) -> Tensor:
        T, K = q.shape[1:]
        wide = accumulation_dtype(q)
        positions = torch.arange(T, dtype=torch.int32, device=q.device)
        exps, totals, outs = [], [], []
        for block, seen in _blocks(T):
            scores = (q[:, block].contiguous() @ k[:, seen].contiguous().mT).to(wide) * K**-0.5
            hidden = positions[block, None] < positions[seen]
            if first_XT1 is not None:
                hidden = hidden | (positions[seen] < first_XT1[:, block])
            maximum = scores.masked_fill(hidden, -torch.inf).amax(-1, keepdim=True)
            exp = (scores - maximum).exp().masked_fill(hidden, 0).to(q.dtype)
            # Dividing the output is less work than dividing the exponentials.
            total = exp.sum(-1, keepdim=True, dtype=wide)
            outs.append(((exp @ v[:, seen].contiguous()) / total).to(q.dtype))
            exps.append(exp)
            totals.append(total)
        out = torch.cat(outs, dim=1)
        ctx.save_for_backward(q, k, v, out, *exps, *totals)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """As in FlashAttention: https://arxiv.org/abs/2205.14135, appendix B.4."""
        q, k, v, out, *blocks = ctx.saved_tensors
        T, K = q.shape[1:]
        wide = accumulation_dtype(q)
        exps, totals = blocks[: len(blocks) // 2], blocks[len(blocks) // 2 :]
        dqs = []
        dk, dv = (torch.zeros_like(x, dtype=wide) for x in (k, v))
        for (block, seen), exp, total in zip(_blocks(T), exps, totals, strict=True):
            dout_block = (dout[:, block].to(wide) / total).to(q.dtype)
            delta = (dout_block.to(wide) * out[:, block].to(wide)).sum(-1, keepdim=True)
            dsoftmax = (dout_block @ v[:, seen].contiguous().mT).to(wide)
            dscores = (exp.to(wide) * (dsoftmax - delta) * K**-0.5).to(q.dtype)
            dqs.append(dscores @ k[:, seen].contiguous())
            unseen = (0, 0, 0, T - seen.stop)
            dk = dk + F.pad((dscores.mT @ q[:, block].contiguous()).to(wide), unseen)
            dv = dv + F.pad((exp.mT @ dout_block).to(wide), unseen)
        return torch.cat(dqs, dim=1), dk.to(q.dtype), dv.to(q.dtype), None


def _blocks(n_tokens: int) -> list[tuple[slice, slice]]:
    """The queries of every block, and the keys that they may see."""
    starts = range(0, n_tokens, BLOCK)
    ends = [min(start + BLOCK, n_tokens) for start in starts]
    return [(slice(start, end), slice(0, end)) for start, end in zip(starts, ends, strict=True)]


def document_starts(cu_seqlens: Tensor, n_tokens: int) -> Tensor:
    """Return the first token of every token's document, (n_tokens,) in the dtype of `cu_seqlens`.

    Tokens are counted over all sequences, as in `cu_seqlens`. No value is read back to the host.
    """
    tokens = torch.arange(n_tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    # Of documents of length 0, which start at the same token, the last is found.
    return cu_seqlens[torch.searchsorted(cu_seqlens, tokens, right=True) - 1]
