"""The shards of one split as a single stream of tokens, cut into sequences."""

from collections.abc import Iterator
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from fastllama.data.manifest import DataFolder, Manifest, Shard, damaged, sha256_of
from fastllama.data.remote_folder import RemoteFolder, RemoteTokenFile
from fastllama.data.token_file import TokenFile

MAX_OPEN = 64
"""Shards of a stream that are open at a time. A process may often have 1024 files open, or 256."""


class TokenStream:
    """Token stream of a split. Sequence i is tokens i*T to i*T + T, both included.

    T inputs and T targets need T + 1 tokens, so sequences i and i + 1 share one token. Sequences
    may cross shards. Threads and forked processes may read at the same time.
    """

    def __init__(self, folder: DataFolder, manifest: Manifest, split: str) -> None:
        """Open each shard of `split` once, and check its size and type.

        Raises:
            ValueError: a shard is missing or has the wrong size, shape or type.
        """
        self._shards = manifest.splits[split].shards
        # A file that the cache drops is closed once no thread reads it any more.
        self._open = lru_cache(MAX_OPEN)(partial(manifest.open_shard, folder))
        self._stamps = {shard.file: self._open(shard).stamp for shard in self._shards}
        self._starts = np.cumsum([0] + [shard.tokens for shard in self._shards])
        self._vocab_size = manifest.vocab_size
        self.is_remote = isinstance(folder, RemoteFolder)
        """Whether `fetch` makes reading faster."""
        self.n_tokens = int(self._starts[-1])

    def n_sequences(self, seq_len: int) -> int:
        """Number of whole sequences of `seq_len` inputs."""
        return max(0, (self.n_tokens - 1) // seq_len)

    def read(self, index: int, seq_len: int) -> NDArray[np.integer]:
        """Tokens of sequence `index`, (seq_len + 1,), in the dtype of the shards.

        Raises:
            ValueError: a token id is outside of the vocabulary, or a shard was replaced.
            OSError: a shard can no longer be read.
        """
        pieces = [self._read_shard(*span) for span in self._spans(index, seq_len)]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def fetch(self, index: int, seq_len: int) -> None:
        """Start to fetch what `read` with these arguments will need, if it is behind a URL."""
        for shard, first, n in self._spans(index, seq_len):
            file = self._open(shard)
            if isinstance(file, RemoteTokenFile):
                file.fetch(first, n)

    def _spans(self, index: int, seq_len: int) -> Iterator[tuple[Shard, int, int]]:
        """The shards of a sequence: the first token in each, and their number."""
        position, end = index * seq_len, index * seq_len + seq_len + 1
        shard = int(np.searchsorted(self._starts, position, side="right")) - 1
        while position < end:
            stop = min(end, int(self._starts[shard + 1]))
            yield self._shards[shard], position - int(self._starts[shard]), stop - position
            position, shard = stop, shard + 1

    def _read_shard(self, shard: Shard, first: int, n: int) -> NDArray[np.integer]:
        file = self._open(shard)
        # Of a URL, a file stays as it was found.
        if isinstance(file, TokenFile) and file.stamp != self._stamps[shard.file]:
            # A copy or `touch` also changes the time, and is no reason to end a run.
            if (found := sha256_of(file.path)) != shard.sha256:
                raise damaged(file.path, f"SHA-256 {found}", shard.sha256)
            self._stamps[shard.file] = file.stamp
        tokens = file.read(first, n)
        if n and tokens.max() >= self._vocab_size:
            at = int(np.argmax(tokens >= self._vocab_size))
            found = f"token id {tokens[at]} at position {first + at}"
            raise damaged(file.path, found, f"ids below {self._vocab_size}")
        return tokens
