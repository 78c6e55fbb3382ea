"""RoPE: rotate each pair (x_i, x_{i+R}) of every query and key head by the angle of its position.

    y_i     = x_i * cos_i - x_{i+R} * sin_i
    y_{i+R} = x_{i+R} * cos_i + x_i * sin_i

Shapes: qkv (B, T, E), the packed projection, E = (H + 2G) * K: H query heads, then G key heads,
then G value heads of any even width K = 2R; cos, sin (P, R) float32, one row per position. Values
are not rotated. Arithmetic is in float32 (in the reference, float64 for float64), rounded once. Not
included: rotating part of a head, and adjacent pairs (x_2i, x_{2i+1}).
`rope` rotates qkv in place; q, k and v are views of it. The backward rotates the gradients back
and packs them into one buffer, so no concatenation follows.
Saved for backward: the tables and the positions.
Bytes, for N rows and b bytes per element: forward 2 N (H + G) K b; backward 2 N (H + 2G) K b.
Source: Su et al. 2021, https://arxiv.org/abs/2104.09864, with the half-split pairs of GPT-NeoX.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastllama_kernels._dtype import accumulation_dtype, check_kernel_dtypes
from fastllama_kernels._library import may_write_to_inputs, register


def rope_reference(
    qkv_BTE: Tensor,
    cos_PR: Tensor,
    sin_PR: Tensor,
    n_heads: int,
    n_kv_heads: int,
    positions_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split a packed projection into heads and rotate queries and keys.

    Args:
        qkv_BTE: (B, T, E), E = (H + 2G) * K; not written to.
        cos_PR: (P, R) cosines; P >= T without positions.
        sin_PR: (P, R) sines.
        n_heads: H.
        n_kv_heads: G.
        positions_BT: the table row of every token; None means 0 to T - 1.

    Returns:
        q (B, T, H, K), k (B, T, G, K), v (B, T, G, K).
    """
    heads = qkv_BTE.unflatten(-1, (n_heads + 2 * n_kv_heads, -1))
    rotated, v_BTGK = heads.split((n_heads + n_kv_heads, n_kv_heads), dim=2)
    cos, sin = (
        table[: qkv_BTE.shape[1]] if positions_BT is None else table[positions_BT]
        for table in (cos_PR, sin_PR)
    )
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    wide = accumulation_dtype(qkv_BTE)
    # Converted by halves: compiled, the backward then writes no wide gradient of the whole.
    first, second = (half.to(wide) for half in rotated.chunk(2, dim=-1))
    halves = first * cos - second * sin, second * cos + first * sin
    rotated = torch.cat([half.to(qkv_BTE.dtype) for half in halves], dim=-1)
    q_BTHK, k_BTGK = rotated.split((n_heads, n_kv_heads), dim=2)
    return q_BTHK, k_BTGK, v_BTGK


@triton.jit
def _tile(N_HEADS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_HEADS: tl.constexpr):
    """Return the rows and the first head of a program; neighbouring programs share their rows.

    Rows are int32, because the division of int64 by T is a routine of a hundred instructions.
    """
    N_BLOCKS: tl.constexpr = N_HEADS // BLOCK_HEADS
    program = tl.program_id(0)
    rows = program // N_BLOCKS * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    return rows, program % N_BLOCKS * BLOCK_HEADS


@triton.jit
def _load_angles(
    cos_ptr, sin_ptr, positions_ptr, rows, row_mask, mask, T, R: tl.constexpr, BLOCK_R: tl.constexpr
):
    """Return cos and sin at the positions of `rows`, shaped like `mask` (rows, heads, BLOCK_R).

    The heads load from the same addresses. Angles without heads would be broadcast through shared
    memory.
    """
    pairs = tl.arange(0, BLOCK_R)
    if positions_ptr is None:
        positions = (rows % T).to(tl.int64)
    else:
        positions = tl.load(positions_ptr + rows, row_mask, other=0).to(tl.int64)
    offsets = positions[:, None, None] * R + pairs[None, None, :]
    offsets = tl.broadcast_to(offsets, mask.shape)
    cos = tl.load(cos_ptr + offsets, mask, other=0.0)
    sin = tl.load(sin_ptr + offsets, mask, other=0.0)
    return cos, sin


@triton.jit
def _rope_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    n_rows,
    T,
    N_ROTATED_HEADS: tl.constexpr,
    N_HEADS: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    rows, head = _tile(N_ROTATED_HEADS, BLOCK_ROWS, BLOCK_HEADS)
    heads = head + tl.arange(0, BLOCK_HEADS)
    pairs = tl.arange(0, BLOCK_R)
    row_mask = rows < n_rows
    mask = row_mask[:, None, None] & (heads >= 0)[None, :, None] & (pairs < R)[None, None, :]
    offsets = (rows.to(tl.int64)[:, None, None] * N_HEADS + heads[None, :, None]) * (2 * R)
    offsets += pairs[None, None, :]
    # Before the angles, which the caches have: the short wait is part of the long one.
    first = tl.load(qkv_ptr + offsets, mask, other=0.0).to(tl.float32)
    second = tl.load(qkv_ptr + offsets + R, mask, other=0.0).to(tl.float32)
    cos, sin = _load_angles(cos_ptr, sin_ptr, positions_ptr, rows, row_mask, mask, T, R, BLOCK_R)
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    tl.store(qkv_ptr + offsets, (first * cos - second * sin).to(dtype), mask)
    tl.store(qkv_ptr + offsets + R, (second * cos + first * sin).to(dtype), mask)


@triton.jit
def _rope_bwd_kernel(
    dq_ptr,
    dk_ptr,
    dv_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    dqkv_ptr,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    k_stride_b,
    k_stride_t,
    k_stride_h,
    v_stride_b,
    v_stride_t,
    v_stride_h,
    n_rows,
    T,
    H: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    rows, head = _tile(H + 2 * G, BLOCK_ROWS, BLOCK_HEADS)
    # All heads of a program are in one of the three: BLOCK_HEADS divides H and G. The branches need
    # equal types, and Triton passes a stride of 2^31 or more as int64, another one as int32.
    if head < H:
        x_ptr = dq_ptr + head.to(tl.int64) * q_stride_h
        stride_b = tl.cast(q_stride_b, tl.int64)
        stride_t = tl.cast(q_stride_t, tl.int64)
        stride_h = tl.cast(q_stride_h, tl.int64)
    elif head < H + G:
        x_ptr = dk_ptr + (head - H).to(tl.int64) * k_stride_h
        stride_b = tl.cast(k_stride_b, tl.int64)
        stride_t = tl.cast(k_stride_t, tl.int64)
        stride_h = tl.cast(k_stride_h, tl.int64)
    else:
        x_ptr = dv_ptr + (head - H - G).to(tl.int64) * v_stride_h
        stride_b = tl.cast(v_stride_b, tl.int64)
        stride_t = tl.cast(v_stride_t, tl.int64)
        stride_h = tl.cast(v_stride_h, tl.int64)
    heads = tl.arange(0, BLOCK_HEADS)
    pairs = tl.arange(0, BLOCK_R)
    row_mask = rows < n_rows
    mask = row_mask[:, None, None] & (heads >= 0)[None, :, None] & (pairs < R)[None, None, :]
    starts = (rows // T).to(tl.int64) * stride_b + (rows % T).to(tl.int64) * stride_t
    offsets = starts[:, None, None] + heads.to(tl.int64)[None, :, None] * stride_h
    offsets += pairs[None, None, :]
    first = tl.load(x_ptr + offsets, mask, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + offsets + R, mask, other=0.0).to(tl.float32)
    # Values are not rotated: their cosine is 1.
    rotated = mask & (head + heads < H + G)[None, :, None]
    cos, sin = _load_angles(cos_ptr, sin_ptr, positions_ptr, rows, row_mask, rotated, T, R, BLOCK_R)
    cos = tl.where(rotated, cos, 1.0)
    # The inverse of a rotation is its transpose: sin changes sign.
    dfirst = first * cos + second * sin
    dsecond = second * cos - first * sin
    offsets = rows.to(tl.int64)[:, None, None] * (H + 2 * G) + head + heads[None, :, None]
    offsets = offsets * (2 * R) + pairs[None, None, :]
    dtype: tl.constexpr = dqkv_ptr.dtype.element_ty
    tl.store(dqkv_ptr + offsets, dfirst.to(dtype), mask)
    tl.store(dqkv_ptr + offsets + R, dsecond.to(dtype), mask)


def launch_config(n_pairs: int, n_heads: int, n_kv_heads: int) -> dict[str, int]:
    """Return the tile of rows x heads x pairs and warps: 2,048 pairs, so 8 pairs per thread.

    A tile has at most 8 heads, and as many as divide the query heads and the key heads.
    """
    block_pairs = triton.next_power_of_2(n_pairs)
    block_heads = math.gcd(8, n_heads, n_kv_heads)
    block_rows = max(1, 2_048 // (block_heads * block_pairs))
    return {
        "BLOCK_R": block_pairs,
        "BLOCK_ROWS": block_rows,
        "BLOCK_HEADS": block_heads,
        "num_warps": 8,
    }


def _n_programs(n_rows: int, n_heads: int, config: dict[str, int]) -> int:
    return triton.cdiv(n_rows, config["BLOCK_ROWS"]) * (n_heads // config["BLOCK_HEADS"])


def _rope_inplace_fake(
    qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, n_heads: int, n_kv_heads: int
) -> None:
    pass


@register(
    "rope_(Tensor(a!) qkv, Tensor cos, Tensor sin, Tensor? positions, int n_heads, int n_kv_heads)"
    " -> ()",
    _rope_inplace_fake,
)
def rope_(
    qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, n_heads: int, n_kv_heads: int
) -> None:
    """Rotate the query and key heads of a contiguous `qkv` (B, T, E) in place."""
    n_pairs = cos.shape[-1]
    config = launch_config(n_pairs, n_heads, n_kv_heads)
    n_rows, n_rotated = qkv.shape[0] * qkv.shape[1], n_heads + n_kv_heads
    if n_rows:
        _rope_kernel[(_n_programs(n_rows, n_rotated, config),)](
            qkv,
            cos.contiguous(),
            sin.contiguous(),
            None if positions is None else positions.contiguous(),
            n_rows,
            qkv.shape[1],
            N_ROTATED_HEADS=n_rotated,
            N_HEADS=n_rotated + n_kv_heads,
            R=n_pairs,
            **config,
        )


def _rope_fwd_fake(
    qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, n_heads: int, n_kv_heads: int
) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


@register(
    "rope_fwd(Tensor qkv, Tensor cos, Tensor sin, Tensor? positions, int n_heads, int n_kv_heads)"
    " -> Tensor",
    _rope_fwd_fake,
)
def rope_fwd(
    qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, n_heads: int, n_kv_heads: int
) -> Tensor:
    """Return a copy of `qkv` (B, T, E) with query and key heads rotated."""
    rotated = qkv.clone(memory_format=torch.contiguous_format)
    rope_(rotated, cos, sin, positions, n_heads, n_kv_heads)
    return rotated


def _rope_bwd_fake(
    dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None
) -> Tensor:
    n_heads = dq.shape[2] + dk.shape[2] + dv.shape[2]
    return dq.new_empty(*dq.shape[:2], n_heads * dq.shape[3])


@register(
    "rope_bwd(Tensor dq, Tensor dk, Tensor dv, Tensor cos, Tensor sin, Tensor? positions)"
    " -> Tensor",
    _rope_bwd_fake,
)
def rope_bwd(
    dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None
) -> Tensor:
    """Rotate `dq` (B, T, H, K) and `dk` (B, T, G, K) back; pack them with `dv` (B, T, G, K)."""
    # Attention may order its gradients by head or by position; only the last stride must be 1.
    dq, dk, dv = (x if x.stride(-1) == 1 else x.contiguous() for x in (dq, dk, dv))
    n_heads, n_kv_heads, n_pairs = dq.shape[2], dk.shape[2], cos.shape[-1]
    dqkv = _rope_bwd_fake(dq, dk, dv, cos, sin, positions)
    config = launch_config(n_pairs, n_heads, n_kv_heads)
    n_rows = dq.shape[0] * dq.shape[1]
    if n_rows:
        _rope_bwd_kernel[(_n_programs(n_rows, n_heads + 2 * n_kv_heads, config),)](
            dq,
            dk,
            dv,
            cos.contiguous(),
            sin.contiguous(),
            None if positions is None else positions.contiguous(),
            dqkv,
            *dq.stride()[:3],
            *dk.stride()[:3],
            *dv.stride()[:3],
            n_rows,
            dq.shape[1],
            H=n_heads,
            G=n_kv_heads,
            R=n_pairs,
            **config,
        )
    return dqkv


class _Rope(torch.autograd.Function):
    """Split `qkv` into q, k and v, after rotating a copy unless `qkv` is rotated already."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv_BTE: Tensor,
        cos_PR: Tensor,
        sin_PR: Tensor,
        positions_BT: Tensor | None,
        n_heads: int,
        n_kv_heads: int,
        is_rotated: bool,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos_PR, sin_PR, positions_BT)
        if not is_rotated:
            qkv_BTE = rope_fwd(qkv_BTE, cos_PR, sin_PR, positions_BT, n_heads, n_kv_heads)
        heads = qkv_BTE.unflatten(-1, (n_heads + 2 * n_kv_heads, -1))
        return heads.split((n_heads, n_kv_heads, n_kv_heads), dim=2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        dqkv = rope_bwd(dq, dk, dv, *ctx.saved_tensors)
        return dqkv, None, None, None, None, None, None


def rope(
    qkv_BTE: Tensor,
    cos_PR: Tensor,
    sin_PR: Tensor,
    n_heads: int,
    n_kv_heads: int,
    positions_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate queries and keys of a packed projection in place; return views of it.

    `qkv` is copied first if it is not contiguous, or in eager mode under a dispatch mode such as
    selective activation checkpointing, which may have saved it.

    Args:
        qkv_BTE: (B, T, E), E = (H + 2G) * K; float32, bfloat16 or float16.
        cos_PR: (P, R) cosines, float32; P >= T without positions.
        sin_PR: (P, R) sines, float32.
        n_heads: H.
        n_kv_heads: G.
        positions_BT: the table row of every token, integers below P, which is not checked; None
            means 0 to T - 1. To decode at an offset, passing `cos[offset:]` works too.

    Returns:
        q (B, T, H, K), k (B, T, G, K), v (B, T, G, K).

    Raises:
        ValueError: shapes or dtypes that do not match, or tensors not on CUDA.
    """
    _check(qkv_BTE, cos_PR, sin_PR, n_heads, n_kv_heads, positions_BT)
    qkv_BTE = qkv_BTE.contiguous()
    inplace = may_write_to_inputs()
    if inplace:
        # Outside the autograd Function: torch.compile may lose a mutation inside one. The matmul
        # that made qkv does not save it for backward; autograd raises if another producer does.
        with torch.no_grad():
            rope_(qkv_BTE, cos_PR, sin_PR, positions_BT, n_heads, n_kv_heads)
    return _Rope.apply(qkv_BTE, cos_PR, sin_PR, positions_BT, n_heads, n_kv_heads, inplace)


def _check(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    n_heads: int,
    n_kv_heads: int,
    positions: Tensor | None,
) -> None:
    check_kernel_dtypes(qkv=qkv)
    width = (n_heads + 2 * n_kv_heads) * 2 * cos.shape[-1]
    if qkv.ndim != 3 or qkv.shape[-1] != width:
        raise ValueError(
            f"qkv has shape {tuple(qkv.shape)}; {n_heads} + 2 x {n_kv_heads} heads and tables of "
            f"{cos.shape[-1]} pairs need (B, T, {width})."
        )
    if cos.dtype != torch.float32 or sin.dtype != torch.float32 or cos.shape != sin.shape:
        raise ValueError(
            f"cos is {cos.dtype} {tuple(cos.shape)} and sin {sin.dtype} {tuple(sin.shape)}; both "
            "must be float32 (P, R): a position needs more digits than bfloat16 has."
        )
    if positions is None and len(cos) < qkv.shape[1]:
        raise ValueError(
            f"The tables have {len(cos)} positions, and the sequences {qkv.shape[1]}; make longer "
            "tables, or pass positions."
        )
    if positions is not None and positions.shape != qkv.shape[:2]:
        raise ValueError(
            f"positions has shape {tuple(positions.shape)}, and needs {tuple(qkv.shape[:2])}."
        )
