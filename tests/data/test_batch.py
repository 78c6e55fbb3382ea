from pathlib import Path

import numpy as np
import pytest
import torch

from fastllama.data.batch import IGNORED, read_batch, sequences_at
from fastllama.data.order import sequence_indices
from fastllama.data.stream import TokenStream
from tests.data.folder import make_stream

T = 3
N_SEQUENCES = 10


@pytest.fixture
def stream(tmp_path: Path) -> TokenStream:
    """Token i is i, in two shards."""
    return make_stream(tmp_path, range(17), range(17, N_SEQUENCES * T + 1))


@pytest.mark.parametrize("sequences", [[4, 0, 5, 4], [9, 5], range(7, 8), []], ids=str)
def test_targets_are_shifted_and_rows_padded(stream: TokenStream, sequences: list[int]) -> None:
    out = torch.full((2, 4, T), 77)
    read_batch(stream, sequences, out)
    n = len(sequences)
    first = torch.tensor(sequences, dtype=torch.int64)[:, None] * T
    assert torch.equal(out[0, :n], first + torch.arange(T))
    assert torch.equal(out[1, :n], out[0, :n] + 1)
    assert (out[0, n:] == 0).all()
    assert (out[1, n:] == IGNORED).all()


def test_ids_beyond_16_bits(tmp_path: Path) -> None:
    out = torch.empty(2, 1, 2, dtype=torch.int64)
    read_batch(make_stream(tmp_path, [1, 128_255, 70_000], dtype="uint32"), [0], out)
    assert out.tolist() == [[[1, 128_255]], [[128_255, 70_000]]]


def test_more_sequences_than_rows(stream: TokenStream) -> None:
    with pytest.raises(IndexError):
        read_batch(stream, range(3), torch.empty(2, 2, T, dtype=torch.int64))


def test_sequences_follow_the_data_order(stream: TokenStream) -> None:
    # Over the end of two epochs.
    found = sequences_at(range(7, 26), stream, T, seed=5)
    assert found == sequence_indices(np.arange(7, 26), N_SEQUENCES, seed=5).tolist()
    assert sequences_at(range(0), stream, T, seed=5) == []
