"""The key/value cache that decoding reads."""

import torch
from torch import Tensor


class KVCache:
    """Keys and values of every layer at the positions decoded so far."""

    def __init__(self, n_positions: int) -> None:
        """Start empty. The first `extend` of a layer allocates `n_positions`."""
        self.length = 0
        self._n_positions = n_positions
        self._layers: dict[int, Tensor] = {}

    def extend(self, layer: int, kv_BTXK: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Append T positions to one layer; return all of its positions, (B, S, X, K).

        The X = 2G heads are keys, then values. `dtype` is that of the cache; None means that of
        `kv`.
        """
        if layer not in self._layers:
            batch_size, _, *heads = kv_BTXK.shape
            self._layers[layer] = kv_BTXK.new_empty(
                (batch_size, self._n_positions, *heads), dtype=dtype
            )
        n_new = kv_BTXK.shape[1]
        self._layers[layer].narrow(1, self.length, n_new).copy_(kv_BTXK)
        return self._layers[layer].narrow(1, 0, self.length + n_new)
