import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastllama.data.stream import TokenStream
from tests.data.folder import make_folder, make_stream

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


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_ids_outside_of_the_vocabulary(tmp_path: Path, dtype: str) -> None:
    manifest = make_folder(tmp_path, {"train": [range(40, 50), range(50, 60)]}, dtype)
    stream = TokenStream(tmp_path, replace(manifest, vocab_size=55), "train")
    assert stream.read(0, 14).tolist() == list(range(40, 55))
    with pytest.raises(
        ValueError,
        match=r"train-00001\.npy is damaged: found token id 55 at position 5, expected ids below",
    ):
        stream.read(0, 15)
