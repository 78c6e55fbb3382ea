"""Blocks for generation on a CPU: half as many operator calls, weights in the order of oneDNN.

Decoding a token takes hundreds of operator calls, and most of them cost more than their arithmetic.
What saves calls:

- The weight w of a norm becomes part of the projection W behind it. With scale = sqrt(D) rms(x) of
  each row, rms_norm(x) W^T = (x / scale) (sqrt(D) w W)^T = (x (sqrt(D) w W)^T) / scale.
- Elements j and K/2 + j of a query or key become neighbours: a complex number, which a product with
  cos + i sin rotates. Products of queries and keys do not depend on the order of the elements.
  One product rotates queries, keys and values; the factors of values are 1.
- The last matmul of a branch adds to the residual stream.

Shapes as in `fastllama.model.llama`. X counts heads.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastllama.model.kv_cache import KVCache
from fastllama.model.llama import Block, Linear, Llama
from fastllama_kernels import can_pack, linear, linear_add, pack_weight


def pack_model(model: Llama) -> None:
    """Replace blocks, final norm and output projection by packed ones, where the device has them.

    The model then generates faster on a CPU. It can neither train nor be saved.
    """
    projections = [module for module in model.modules() if isinstance(module, Linear)]
    if not all(can_pack(projection.weight) for projection in projections):
        return
    rotation = Rotation(model)
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        model.blocks[layer] = PackedBlock(block, rotation)
    packed = pack_weight(_with_norm(model.norm, model.output))
    model.output.weight = nn.Parameter(packed, requires_grad=False)
    model.norm = PackedNorm(model.norm)  # type: ignore[assignment]


class Rotation:
    """Factors that rotate packed queries, keys and values, the same for all blocks."""

    def __init__(self, model: Llama) -> None:
        """Keep cos + i sin of every position and rotary pair."""
        config = model.config
        self._factors_P1R = torch.complex(model.cos_PR, model.sin_PR).unsqueeze(1)
        self._n_rotated, self._n_values = config.n_heads + config.kv_heads, config.kv_heads
        self._positions: range | None = None

    def rows(self, start: int, n_new: int) -> Tensor:
        """The factors of `n_new` positions from `start`, (T, E / 2) complex64."""
        positions = range(start, start + n_new)
        # Not of the whole context: they could take gigabytes.
        if positions != self._positions:
            factors_T1R = self._factors_P1R.narrow(0, start, n_new)
            rotated_TXR = factors_T1R.expand(-1, self._n_rotated, -1)
            values_TXR = torch.ones_like(factors_T1R).expand(-1, self._n_values, -1)
            self._positions = positions
            self._rows_TE = torch.cat((rotated_TXR, values_TXR), dim=1).flatten(1)
        return self._rows_TE


class PackedNorm(nn.Module):
    """A norm without its weight, which is part of the projection behind it."""

    def __init__(self, norm: nn.RMSNorm) -> None:
        """Keep sqrt(D eps) of `norm`."""
        super().__init__()
        assert norm.eps is not None
        self.root = torch.tensor((norm.weight.numel() * norm.eps) ** 0.5)

    def scale(self, x_BTD: Tensor) -> Tensor:
        """sqrt(D (mean(x^2) + eps)) of each row of `x`, (B, T, 1) float32."""
        norm_BT1 = torch.linalg.vector_norm(x_BTD, dim=-1, keepdim=True, dtype=torch.float32)
        return torch.hypot(norm_BT1, self.root)

    def forward(self, x_BTD: Tensor, stream_BTD: None = None) -> Tensor:
        """Divide `x` by its scale, (B, T, D), in the dtype of `x`."""
        # An operator of mixed dtypes would convert in a pass that is slower.
        x32_BTD = x_BTD.float()
        return (x32_BTD / self.scale(x32_BTD)).to(x_BTD.dtype)


class PackedBlock(nn.Module):
    """Takes the place of a `Block` in evaluation mode."""

    def __init__(self, block: Block, rotation: Rotation) -> None:
        """Copy the weights of `block`."""
        super().__init__()
        attention, mlp = block.attention, block.mlp
        self.heads = attention.n_heads, 2 * attention.n_kv_heads
        self.layer = attention.layer
        self.attention = attention.operators.attention
        self.dtype = attention.qkv.weight.dtype
        self.rotation = rotation
        self.attention_norm, self.mlp_norm = PackedNorm(attention.norm), PackedNorm(mlp.norm)
        qkv_ED = _with_norm(attention.norm, attention.qkv)
        n_rotated = attention.n_heads + attention.n_kv_heads
        self.qkv = pack_weight(_with_neighbours(qkv_ED, n_rotated, sum(self.heads)))
        self.output = pack_weight(attention.output.weight)
        self.gate_up = pack_weight(_with_norm(mlp.norm, mlp.gate_up))
        self.down = pack_weight(mlp.down.weight)

    def forward(
        self,
        x_BTD: Tensor,
        stream_BTD: None,
        rotary: tuple[Tensor, Tensor],
        cache: KVCache | None = None,
        last_only: bool = False,
        cu_seqlens: None = None,
    ) -> tuple[Tensor, None]:
        """As `Block`, but its first result is the stream (B, T, D), with nothing left to add.

        So `stream` is None, and so is the second result. `rotary` is not read, and `cu_seqlens`
        has to be None.
        """
        batch_size, n_new, _ = x_BTD.shape
        by_head = batch_size, n_new, self.heads[0] + self.heads[1], -1
        start = 0 if cache is None else cache.length
        qkv_BTE = linear(x_BTD, self.qkv).float().div_(self.attention_norm.scale(x_BTD))
        qkv_BTE.view(torch.complex64).mul_(self.rotation.rows(start, n_new))
        # `Tensor.split` is a function in Python, which takes three times as long.
        q_BTHK, kv_BSXK = qkv_BTE.view(by_head).split_with_sizes(self.heads, 2)
        if cache is not None:
            cached_BSXK = cache.extend(self.layer, kv_BSXK, self.dtype)
            if start > 0:
                q_BTHK, kv_BSXK = q_BTHK.to(self.dtype), cached_BSXK
        if last_only:
            q_BTHK, x_BTD = q_BTHK[:, -1:], x_BTD[:, -1:]
        # A prompt attends in float32, in which PyTorch's kernel for CPUs is as fast as in bfloat16.
        out_BTHK = self.attention(q_BTHK, *kv_BSXK.chunk(2, dim=2))
        x_BTD = linear_add(out_BTHK.flatten(2).to(self.dtype), self.output, x_BTD)
        y_BTD = self.mlp_norm(x_BTD)
        gate_BTF, up_BTF = linear(y_BTD, self.gate_up).chunk(2, dim=-1)
        return linear_add(F.silu(gate_BTF).mul_(up_BTF), self.down, x_BTD), None


def _with_norm(norm: nn.RMSNorm, projection: Linear) -> Tensor:
    """sqrt(D) w W of a norm's weight w (D,) and a projection's weight W (out, D), dtype of W."""
    weight_D, projection_OD = norm.weight.detach().float(), projection.weight.detach()
    return (weight_D * weight_D.numel() ** 0.5 * projection_OD).to(projection_OD.dtype)


def _with_neighbours(qkv_ED: Tensor, n_rotated: int, n_heads: int) -> Tensor:
    """Rows of each of the first `n_rotated` heads in the order 0, K/2, 1, K/2 + 1, ..., K - 1."""
    heads_XKD = qkv_ED.unflatten(0, (n_heads, -1))
    halves_X2RD = heads_XKD[:n_rotated].unflatten(1, (2, -1))
    neighbours_XKD = halves_X2RD.transpose(1, 2).flatten(1, 2)
    return torch.cat([neighbours_XKD, heads_XKD[n_rotated:]]).flatten(0, 1)
