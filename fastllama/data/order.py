"""The data order: a pseudo-random permutation of the sequences, computed instead of stored.

Position p of the run is sequence `permutation(p mod n)` of epoch `p // n`. Every (seed, epoch) has
its own permutation. Nothing is stored or shuffled in memory, so any number of ranks agree on the
order, and a run resumes from the single integer p.

The permutation is a Feistel network over the smallest even number of bits that holds n - 1. Values
of n or more are encrypted again until they are below n (cycle walking: Black and Rogaway 2002,
"Ciphers with arbitrary finite domains").
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6


def sequence_indices(positions: NDArray[np.int64], n: int, seed: int) -> NDArray[np.int64]:
    """Sequence number, in [0, n), at each of the global `positions` (non-negative, any shape)."""
    indices = np.empty_like(positions)
    epochs = positions // n
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        indices[chosen] = permutation(positions[chosen] % n, n, seed, int(epoch))
    return indices


def permutation(indices: NDArray[np.int64], n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Images of `indices`, each in [0, n), under the permutation of (seed, epoch)."""
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    keys = _round_keys(seed, epoch)
    values = _feistel(indices.astype(np.uint64), half_bits, keys)
    while (outside := values >= n).any():
        values[outside] = _feistel(values[outside], half_bits, keys)
    return values.astype(np.int64)


def _round_keys(seed: int, epoch: int) -> NDArray[np.uint64]:
    digest = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def _feistel(
    values: NDArray[np.uint64], half_bits: int, keys: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Finaliser of SplitMix64 (Steele et al. 2014): each input bit affects every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
