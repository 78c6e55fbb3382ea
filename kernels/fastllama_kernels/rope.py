"""RoPE: turn each pair (x_i, x_{i + K/2}) of every query and key head by its position's angle.

    y_i       = x_i * cos - x_{i + K/2} * sin
    y_{i+K/2} = x_{i + K/2} * cos + x_i * sin

Shapes: qkv (B, T, (H + 2G) * K), the packed projection: H query heads, then G key heads, then G
value heads of width K; cos, sin (S, K/2) float32, one row a position. Values pass unchanged.
Products are in float32 (float64 for float64 inputs), rounded once.
Source: Su et al. 2021, https://arxiv.org/abs/2104.09864, with the half-split pairs of GPT-NeoX.
"""

import torch
from torch import Tensor

from fastllama_kernels._dtype import accumulation_dtype


def rope_reference(
    qkv_BTE: Tensor,
    cos_SK: Tensor,
    sin_SK: Tensor,
    n_heads: int,
    n_kv_heads: int,
    positions_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split a packed projection into heads and rotate queries and keys.

    Args:
        qkv_BTE: (B, T, (H + 2G) * K).
        cos_SK: (S, K/2) cosines, S >= T.
        sin_SK: (S, K/2) sines.
        n_heads: H.
        n_kv_heads: G.
        positions_BT: rows of the tables to use, (B, T); None means 0 to T-1.

    Returns:
        q (B, T, H, K), k (B, T, G, K), v (B, T, G, K).
    """
    heads = qkv_BTE.unflatten(-1, (n_heads + 2 * n_kv_heads, -1))
    rotated, v_BTGK = heads.split((n_heads + n_kv_heads, n_kv_heads), dim=2)
    cos, sin = (
        table[: qkv_BTE.shape[1]] if positions_BT is None else table[positions_BT]
        for table in (cos_SK, sin_SK)
    )
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    first, second = rotated.to(accumulation_dtype(qkv_BTE)).chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    q_BTHK, k_BTGK = rotated.to(qkv_BTE.dtype).split((n_heads, n_kv_heads), dim=2)
    return q_BTHK, k_BTGK, v_BTGK
