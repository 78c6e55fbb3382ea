import itertools
from pathlib import Path

import numpy as np
import pytest

from tests.data.folder import make_stream

TOKENS = list(range(40, 63))


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("seq_len", [1, 4, 22])
@pytest.mark.parametrize("cuts", [(), (7,), (4, 8, 9), (5, 5, 20)], ids=str)
def test_sequences_cross_shards(
    tmp_path: Path, cuts: tuple[int, ...], seq_len: int, dtype: str
) -> None:
    bounds = [0, *cuts, len(TOKENS)]
    shards = [TOKENS[a:b] for a, b in itertools.pairwise(bounds)]
    stream = make_stream(tmp_path, *shards, dtype=dtype)
    assert stream.n_tokens == len(TOKENS)
    for index in range(stream.n_sequences(seq_len)):
        tokens = stream.read(index, seq_len)
        assert tokens.dtype == np.dtype(dtype)
        # The last token is also the first token of the next sequence.
        assert tokens.tolist() == TOKENS[index * seq_len : index * seq_len + seq_len + 1]


@pytest.mark.parametrize(
    ("seq_len", "n_sequences"), [(1, 22), (2, 11), (11, 2), (12, 1), (22, 1), (23, 0), (100, 0)]
)
def test_last_sequence_needs_its_last_target(
    tmp_path: Path, seq_len: int, n_sequences: int
) -> None:
    assert make_stream(tmp_path, TOKENS).n_sequences(seq_len) == n_sequences


def test_ids_beyond_16_bits(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, [1, 128_255, 70_000], dtype="uint32")
    assert stream.read(0, 2).tolist() == [1, 128_255, 70_000]
