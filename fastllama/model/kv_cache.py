"""The key/value cache that decoding reads."""

from torch import Tensor


class KVCache:
    """Keys and values of every layer at the positions decoded so far."""

    def __init__(self, n_positions: int) -> None:
        """Start empty. The first `extend` of a layer allocates `n_positions`."""
        self.length = 0
        self._n_positions = n_positions
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: int, k_BTGK: Tensor, v_BTGK: Tensor) -> tuple[Tensor, Tensor]:
        """Append T positions to one layer; return all of its keys and values, (B, S, G, K)."""
        if layer not in self._layers:
            batch_size, _, *head = k_BTGK.shape
            shape = (batch_size, self._n_positions, *head)
            self._layers[layer] = (k_BTGK.new_empty(shape), v_BTGK.new_empty(shape))
        end = self.length + k_BTGK.shape[1]
        for buffer, new in zip(self._layers[layer], (k_BTGK, v_BTGK), strict=True):
            buffer[:, self.length : end] = new
        k_BSGK, v_BSGK = self._layers[layer]
        return k_BSGK[:, :end], v_BSGK[:, :end]
