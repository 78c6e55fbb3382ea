"""The key/value cache that decoding reads."""

import torch
from torch import Tensor


class KVCache:
    """Keys and values of every layer at the positions decoded so far."""

    def __init__(self, n_layers: int, n_positions: int) -> None:
        """Start empty. The first `extend` allocates `n_positions` of every layer."""
        self.length = 0
        self._shape = n_layers, n_positions
        self._kv_LBPXK: Tensor | None = None

    def extend(self, layer: int, kv_BTXK: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Append T positions to one layer; return all of its positions, (B, S, X, K).

        The X = 2G heads are keys, then values. `dtype` is that of the cache; None means that of
        `kv`.
        """
        batch_size, n_new, n_heads, width = kv_BTXK.shape
        if self._kv_LBPXK is None:
            n_layers, n_positions = self._shape
            shape = n_layers, batch_size, n_positions, n_heads, width
            self._kv_LBPXK = kv_BTXK.new_empty(shape, dtype=dtype)
        cached_BPXK = self._kv_LBPXK.select(0, layer)
        cached_BPXK.narrow(1, self.length, n_new).copy_(kv_BTXK)
        return cached_BPXK.narrow(1, 0, self.length + n_new)
